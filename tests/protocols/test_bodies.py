"""From bytes to a parsed body: encodings, compression, forms, large and deep JSON."""

import codecs
import contextlib
import gzip
import json
import sys
import threading
import time
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelquota.protocols import RequestRefusedError, parse_body
from modelquota.protocols.body import LARGE, _decode_large, accepted_encodings, parse_json
from modelquota.protocols.estimate import MEDIA

VALUE = {"model": "m", "text": "Grüße, 世界"}
TEXT = json.dumps(VALUE, ensure_ascii=False)


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
def test_what_json_loads_reads_is_read(encoding):
    assert parse_body(TEXT.encode(encoding)) == json.loads(TEXT.encode(encoding)) == VALUE


def raw_deflate(data):
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(data) + compressor.flush()


@pytest.mark.parametrize(
    ("encoding", "compress"),
    [
        ("gzip", gzip.compress),
        ("GZIP", gzip.compress),
        ("x-gzip", gzip.compress),
        ("deflate", zlib.compress),
        ("deflate", raw_deflate),
        ("identity", bytes),
        ("gzip, identity", gzip.compress),
        ("deflate, gzip", lambda data: gzip.compress(zlib.compress(data))),
        ("gzip", lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:])),
    ],
)
def test_compressed_bodies_are_read(encoding, compress):
    assert parse_body(compress(TEXT.encode()), "application/json", encoding) == VALUE


@pytest.mark.skipif(sys.version_info < (3, 14), reason="zstd comes with Python 3.14")
def test_zstd_is_read():
    from compression import zstd

    assert parse_body(zstd.compress(TEXT.encode()), "", "zstd") == VALUE
    assert "zstd" in accepted_encodings()


@pytest.mark.parametrize("encoding", ["br", "compress", "gzip, br", "gzip, gzip, gzip", "x" * 900])
def test_other_encodings_are_named(encoding):
    with pytest.raises(RequestRefusedError, match="accepted are gzip, deflate") as error:
        parse_body(gzip.compress(TEXT.encode()), "", encoding)
    assert (error.value.status, error.value.code) == (415, "unsupported_encoding")
    assert len(error.value.message) < 200


@pytest.mark.parametrize("data", [TEXT.encode(), b"", gzip.compress(TEXT.encode())[:-4], gzip.compress(b"x")[:12]])
def test_what_is_not_compressed_as_it_says_is_refused(data):
    with pytest.raises(RequestRefusedError) as error:
        parse_body(data, "", "gzip")
    assert (error.value.status, error.value.code) == (400, "invalid_encoding")


@pytest.mark.parametrize("compress", [gzip.compress, zlib.compress, lambda data: gzip.compress(gzip.compress(data))])
def test_a_bomb_is_refused_before_it_is_large(compress):
    bomb = compress(b"[" + b" " * (64 << 20))
    names = {b"\x1f": "gzip"}.get(bomb[:1], "deflate") + (", gzip" if len(bomb) < 1000 else "")
    start = time.process_time()
    with pytest.raises(RequestRefusedError) as error:
        parse_body(bomb, "", "gzip, gzip" if "," in names else names, most=1 << 20)
    assert error.value.status == 413
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"5", b"null", b'{"a": NaN}', b"\xff", b"\xff\xfe{", codecs.BOM_UTF8]
)
def test_what_is_not_an_object_is_refused(data):
    with pytest.raises(RequestRefusedError) as error:
        parse_body(data)
    assert (error.value.status, error.value.code) == (400, "invalid_json")


@pytest.mark.parametrize("size", [2_000, LARGE, 2 * LARGE])
@pytest.mark.parametrize("unit", ["[", '{"a":', "[[],"])
def test_deep_json_is_refused(unit, size):
    with pytest.raises(RequestRefusedError) as error:
        parse_json((unit * (size // len(unit) + 1)).encode())
    assert error.value.code == "invalid_json"


def form(*parts, boundary="b0undary"):
    body = b"".join(
        b'--%b\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % (boundary.encode(), name, more, data)
        for name, more, data in parts
    )
    return body + b"--%b--\r\n" % boundary.encode(), f"multipart/form-data; boundary={boundary}"


def test_a_form_is_read_and_its_files_are_not():
    audio = b'; filename="a.wav"\r\nContent-Type: audio/wav'
    body, kind = form(
        (b"model", b"", b"whisper"), (b"file", audio, bytes(range(256)) * 99), (b"prompt", b"", "ü".encode())
    )
    assert parse_body(body, kind) == {"model": "whisper", "file": MEDIA, "prompt": "ü"}
    assert parse_body(body, kind.replace("b0undary", '"b0undary"'))["model"] == "whisper"


def test_several_files_of_one_name_are_a_list():
    file = (b"image[]", b'; filename="a.png"', b"\x00")
    body, kind = form(file, (b"prompt", b"", b"x"), file, file)
    assert parse_body(body, kind) == {"image[]": [MEDIA] * 3, "prompt": "x"}


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; x=y"])
def test_a_form_without_a_boundary_is_refused(kind):
    with pytest.raises(RequestRefusedError, match="no boundary"):
        parse_body(form()[0], kind)


@given(data=st.binary(max_size=200), cut=st.integers(0, 300))
def test_any_form_is_read_or_refused(data, cut):
    body, kind = form((b"model", b"", b"m"), (b"x", b"", data))
    for broken in (body[:cut], data, body[:cut] + data + body[cut:]):
        try:
            parse_body(broken, kind)
        except RequestRefusedError as error:
            assert error.status == 400  # noqa: PT017


VALUES = st.recursive(
    st.text(max_size=6) | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)
NUMBERS = st.lists(st.integers(-9, 10**6) | st.floats(-1e9, 1e9), min_size=200, max_size=600)


@given(value=VALUES | NUMBERS | st.lists(NUMBERS | VALUES, max_size=3), indent=st.sampled_from([None, 1]),
       cut=st.integers(0, 50), garbage=st.text("[]{},:1 \"", max_size=2))  # fmt: skip
def test_large_json_is_read_as_small_json_is(value, indent, cut, garbage):
    text = json.dumps(value, indent=indent)
    assert _decode_large(text) == json.loads(text)
    broken = text[: len(text) - cut] + garbage
    try:
        expected = json.loads(broken)
    except ValueError:
        with pytest.raises(ValueError):  # noqa: PT011
            _decode_large(broken)
    else:
        assert _decode_large(broken) == expected


@pytest.mark.parametrize("end", ["]", ",]", ",,1]", "", ",", " 1]", "x]"])
def test_long_lists_of_numbers_end_as_they_should(end):
    text = json.dumps(list(range(50_000)))[:-1] + end
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(ValueError):  # noqa: PT011
            _decode_large(text)
    else:
        assert _decode_large(text) == expected


LONG = 2 << 20


@pytest.mark.alone
@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": [' + b"1," * (LONG // 2) + b"1]}",
        b'{"prompt": [' + b"[1]," * (LONG // 4) + b"1]}",
        b'{"prompt": [' + b"{}," * (LONG // 3) + b"1]}",
        b'{"prompt": [' + b'"a",' * (LONG // 4) + b"1]}",
        b'{"prompt": "' + b"word \\n" * (LONG // 7) + b'"}',
        b'{"a":' * (LONG // 5),
        b"[" * LONG,
    ],
    ids=["numbers", "lists", "objects", "strings", "text", "deep objects", "deep lists"],
)
def test_other_threads_run_while_large_json_is_parsed(body):
    """The longest time between two looks at the clock of a thread that does nothing else, by its own processor time."""
    done = threading.Event()

    def parse():
        with contextlib.suppress(RequestRefusedError):
            parse_json(body)
        done.set()

    thread = threading.Thread(target=parse)
    gaps = []
    last = time.perf_counter()
    thread.start()
    while not done.is_set():
        time.sleep(0)
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
    thread.join()
    gaps.append(time.perf_counter() - last)
    # one or two that are longer may be the machine's, not the parser's, which would stop this thread for all of it
    assert sorted(gaps)[-3:][0] < 0.05 or sum(gaps) < 0.1


def test_a_large_body_of_many_small_parts_is_refused():
    body = b'{"prompt": [' + b"[]," * 200_000 + b"1]}"
    assert len(body) > LARGE
    with pytest.raises(RequestRefusedError, match="at most 100,000 lists and objects"):
        parse_json(body)
    text = json.dumps({"prompt": "[{" * 200_000}).encode()
    assert parse_json(text)["prompt"] == "[{" * 200_000, "in a text, brackets are text"
