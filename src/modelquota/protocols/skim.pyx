"""What matters of a short, plain body, read in one pass that makes no object of the rest of it.

Most requests and answers are small, and consist of plain strings and numbers. To parse one takes longer than all that
a quota decides, and the application parses it again. What is not plain here, or not valid, is left to the parser, which
has the last word: each function returns None for it, and otherwise exactly what the parser's way returns.
"""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeASCII
from libc.stdint cimport int64_t
from libc.string cimport memchr, memcmp, strlen

from modelquota.protocols.estimate import MEDIA_FIELDS, TEXT_FIELDS
from modelquota.protocols.request import OUTPUT_FIELDS, Reading
from modelquota.quota.config import MAX_MODEL_ID_BYTES

ctypedef unsigned char byte

cdef Py_ssize_t MOST_MODEL_BYTES = MAX_MODEL_ID_BYTES
cdef object new_tuple = tuple.__new__

cdef enum:
    BYTES_PER_TOKEN = 4     # as in estimate.py
    LONG = 1024             # from which a text may be an encoded file
    MOST_DIGITS = 18        # of a number that fits into 63 bits, whatever its digits
    DEEPEST = 32
    MOST_FIELDS = 32
    MOST_NAMES = 16         # of one object in a text

cdef enum Field:            # of a request, by its index in FIELDS: bounds come after PRIORITY, text from the prompt on
    SEEN = -2
    OTHER = -1
    MODEL = 0
    STREAM = 1
    N = 2
    BEST_OF = 3
    PRIORITY = 4

cdef enum Number:           # of a usage, by its index in NUMBERS
    PROMPT = 0
    OUTPUT = 1
    TOTAL = 2
    PROMPT_DETAILS = 3
    OUTPUT_DETAILS = 4

cdef tuple field_names = (
    "model", "stream", "n", "best_of", "priority", *OUTPUT_FIELDS, "prompt",
    *[name for name in TEXT_FIELDS if name != "prompt"],
)
cdef tuple encoded_fields = tuple([name.encode() for name in field_names])
cdef tuple encoded_media = tuple([name.encode() for name in MEDIA_FIELDS])
cdef const char* FIELDS[MOST_FIELDS]
cdef const char* MEDIA[MOST_FIELDS]     # with one of them, an object may hold media
cdef int prompt_text = field_names.index("prompt")
cdef int field_count = len(encoded_fields)
cdef int media_count = len(encoded_media)
cdef int place
for place in range(field_count):
    FIELDS[place] = encoded_fields[place]
for place in range(media_count):
    MEDIA[place] = encoded_media[place]
cdef const char* NUMBERS[5]
NUMBERS[:] = [
    b"prompt_tokens", b"completion_tokens", b"total_tokens", b"prompt_tokens_details", b"completion_tokens_details",
]
cdef const char* CACHED[1]
CACHED[:] = [b"cached_tokens"]


cdef struct Cursor:
    const byte* at          # the end is a zero, as of every bytes object, which is valid nowhere
    bint ascii

cdef struct Text:
    int64_t bytes
    int64_t tokens          # of what is no text

cdef struct String:
    const byte* start       # after the quote
    Py_ssize_t size         # as it is written
    int64_t bytes           # of UTF-8 that it has once it is parsed
    bint escaped


# -- JSON: each function moves the cursor past what it reads, and returns False for what is not plain

cdef inline byte next_byte(Cursor* cursor) noexcept nogil:
    """The next byte that is not white space."""
    while cursor.at[0] == c" " or cursor.at[0] == c"\n" or cursor.at[0] == c"\r" or cursor.at[0] == c"\t":
        cursor.at += 1
    return cursor.at[0]


cdef inline bint take(Cursor* cursor, char expected) noexcept nogil:
    if next_byte(cursor) != <byte> expected:
        return False
    cursor.at += 1
    return True


cdef inline bint take_word(Cursor* cursor, const char* word) noexcept nogil:
    while word[0]:
        if cursor.at[0] != <byte> word[0]:
            return False
        cursor.at += 1
        word += 1
    return True


cdef bint take_string(Cursor* cursor, String* string) noexcept nogil:
    cdef const byte* at
    cdef byte c
    cdef int code, second
    if not take(cursor, c'"'):
        return False
    at = string.start = cursor.at
    string.bytes = 0
    string.escaped = False
    while True:
        c = at[0]
        if c == c'"':
            break
        if c < 0x20:            # the end of the body, too
            return False
        if c == c"\\":
            string.escaped = True
            c = at[1]
            at += 2
            if c == c"u":
                code = hex_of(at)
                at += 4
                if code < 0 or 0x20 <= code < 0x80 or 0xdc00 <= code < 0xe000:
                    return False    # not a number; a letter, which may be one of "data:"; half a pair
                if 0xd800 <= code < 0xdc00:
                    if at[0] != c"\\" or at[1] != c"u":
                        return False
                    second = hex_of(at + 2)
                    if not 0xdc00 <= second < 0xe000:
                        return False
                    at += 6
                    string.bytes += 4
                else:
                    string.bytes += 1 if code < 0x80 else 2 if code < 0x800 else 3
            elif c == c'"' or c == c"\\" or c == c"/" or c == c"n" or c == c"t" or c == c"r" or c == c"b" or c == c"f":
                string.bytes += 1
            else:
                return False
            continue
        if c >= 0x80:
            cursor.ascii = False
        string.bytes += 1
        at += 1
    string.size = at - string.start
    cursor.at = at + 1
    return True


cdef int hex_of(const byte* at) noexcept nogil:
    """The value of four hexadecimal digits; -1 if they are not."""
    cdef int value = 0
    cdef int i
    cdef byte c
    for i in range(4):
        c = at[i]
        if c"0" <= c <= c"9":
            value = value * 16 + (c - c"0")
        elif c"a" <= (c | 0x20) <= c"f":
            value = value * 16 + ((c | 0x20) - c"a" + 10)
        else:
            return -1           # before the byte after the end is looked at
    return value


cdef bint take_count(Cursor* cursor, int64_t* count) noexcept nogil:
    """A whole number from 0 on, of 18 digits at most."""
    cdef const byte* at
    next_byte(cursor)
    at = cursor.at
    count[0] = 0
    while c"0" <= at[0] <= c"9":
        count[0] = count[0] * 10 + (at[0] - c"0")
        at += 1
        if at - cursor.at > MOST_DIGITS:
            return False
    if at == cursor.at or (cursor.at[0] == c"0" and at - cursor.at > 1):
        return False
    if at[0] == c"." or (at[0] | 0x20) == c"e":
        return False
    cursor.at = at
    return True


cdef bint skip_number(Cursor* cursor) noexcept nogil:
    cdef const byte* start
    if cursor.at[0] == c"-":
        cursor.at += 1
    start = cursor.at
    skip_digits(cursor)
    if cursor.at == start or cursor.at - start > MOST_DIGITS or (start[0] == c"0" and cursor.at - start > 1):
        return False
    if cursor.at[0] == c".":
        cursor.at += 1
        start = cursor.at
        skip_digits(cursor)
        if cursor.at == start:
            return False
    if (cursor.at[0] | 0x20) == c"e":
        cursor.at += 1
        if cursor.at[0] == c"+" or cursor.at[0] == c"-":
            cursor.at += 1
        start = cursor.at
        skip_digits(cursor)
        if cursor.at == start:
            return False
    return True


cdef inline void skip_digits(Cursor* cursor) noexcept nogil:
    while c"0" <= cursor.at[0] <= c"9":
        cursor.at += 1


cdef bint skip_value(Cursor* cursor, int depth) noexcept nogil:
    cdef String string
    cdef byte c = next_byte(cursor)
    if c == c'"':
        return take_string(cursor, &string)
    if c == c"t":
        return take_word(cursor, "true")
    if c == c"f":
        return take_word(cursor, "false")
    if c == c"n":
        return take_word(cursor, "null")
    if c != c"{" and c != c"[":
        return skip_number(cursor)
    if depth == DEEPEST:
        return False
    cursor.at += 1
    if next_byte(cursor) == (c"}" if c == c"{" else c"]"):
        cursor.at += 1
        return True
    while True:
        if c == c"{" and not (take_string(cursor, &string) and take(cursor, c":")):
            return False
        if not skip_value(cursor, depth + 1):
            return False
        if next_byte(cursor) != c",":
            return take(cursor, c"}" if c == c"{" else c"]")
        cursor.at += 1


cdef inline bint take_name(Cursor* cursor, String* name) noexcept nogil:
    """The name of a member, and its colon."""
    return take_string(cursor, name) and not name.escaped and take(cursor, c":")


cdef inline int index_of(const String* name, const char** names, int count, int* seen) noexcept nogil:
    """Which of these a name is; OTHER, or SEEN: of several, the last one counts."""
    cdef int i
    for i in range(count):
        if names[i][0] == <char> name.start[0] and strlen(names[i]) == <size_t> name.size \
                and memcmp(names[i], name.start, name.size) == 0:
            if seen[0] >> i & 1:
                return SEEN
            seen[0] |= 1 << i
            return i
    return OTHER


# -- a request

cdef bint take_text(Cursor* cursor, Text* text, int depth) noexcept nogil:
    """Add what estimate_values() counts in a value: a text, a list of messages, the schemas of tools."""
    cdef String string
    cdef String[MOST_NAMES] names
    cdef int count = 0
    cdef int ignored = 0
    cdef byte c = next_byte(cursor)
    if c == c'"':
        if not take_string(cursor, &string):
            return False
        if string.size >= 5 and memcmp(string.start, "data:", 5) == 0:
            return False
        if string.size >= LONG and memchr(string.start, c" ", LONG) == NULL:    # maybe base64
            return False
        text.bytes += string.bytes
        return True
    if c == c"n":
        return take_word(cursor, "null")
    if c != c"{" and c != c"[":
        text.tokens += 1
        return skip_value(cursor, depth)
    if depth == DEEPEST:
        return False
    cursor.at += 1
    if next_byte(cursor) == (c"}" if c == c"{" else c"]"):
        cursor.at += 1
        return True
    if c == c"[" and (cursor.at[0] == c"-" or c"0" <= cursor.at[0] <= c"9"):     # token ids
        return False
    while True:
        if c == c"{":
            if count == MOST_NAMES or not take_name(cursor, &names[count]) or is_known(names, count):
                return False
            if index_of(&names[count], MEDIA, media_count, &ignored) != OTHER:
                return False
            count += 1
        if not take_text(cursor, text, depth + 1):
            return False
        if next_byte(cursor) != c",":
            return take(cursor, c"}" if c == c"{" else c"]")
        cursor.at += 1


cdef inline bint is_known(const String* names, int count) noexcept nogil:
    """Whether the last of these names is among those before it."""
    cdef int i
    for i in range(count):
        if names[i].size == names[count].size and memcmp(names[i].start, names[count].start, names[i].size) == 0:
            return True
    return False


cdef struct Asked:
    String model
    Text text
    int64_t bound           # -1 if there is none
    bint stream


cdef bint take_request(Cursor* cursor, Asked* asked) noexcept nogil:
    cdef String name
    cdef int64_t count
    cdef int field
    cdef int seen = 0
    cdef bint ascii
    asked.model.start = NULL
    asked.text.bytes = asked.text.tokens = 0
    asked.bound = -1
    asked.stream = False
    if cursor.at[0] != c"{":
        return False
    cursor.at += 1
    while True:
        if not take_name(cursor, &name):
            return False
        field = index_of(&name, FIELDS, field_count, &seen)
        if field == OTHER:
            if not skip_value(cursor, 0):
                return False
        elif field == SEEN or field == PRIORITY:
            return False
        elif field >= prompt_text:
            if field == prompt_text and next_byte(cursor) == c"[":      # several prompts
                return False
            if not take_text(cursor, &asked.text, 0):
                return False
        elif field == MODEL:
            ascii, cursor.ascii = cursor.ascii, True
            if not take_string(cursor, &asked.model) or asked.model.escaped or not cursor.ascii:
                return False
            cursor.ascii = ascii
        elif field == STREAM:
            asked.stream = next_byte(cursor) == c"t"
            if not skip_value(cursor, 0):
                return False
        elif field == N or field == BEST_OF:
            if not take_count(cursor, &count) or count != 1:
                return False
        elif next_byte(cursor) == c"n":     # a bound
            if not take_word(cursor, "null"):
                return False
        elif take_count(cursor, &count):
            asked.bound = max(asked.bound, count)
        else:
            return False
        if next_byte(cursor) != c",":
            break
        cursor.at += 1
    if not take(cursor, c"}"):
        return False
    next_byte(cursor)
    return True


def skim_generation(bytes body not None, params):
    """What a request to generate text says, as the reader of `reads_generation` returns it; None if it is not plain."""
    cdef Cursor cursor
    cdef Asked asked
    cdef const byte* start = <const byte*> PyBytes_AS_STRING(body)
    cursor.at = start
    cursor.ascii = True
    if not take_request(&cursor, &asked) or cursor.at - start != PyBytes_GET_SIZE(body):
        return None
    if not cursor.ascii:
        try:
            body.decode()
        except UnicodeDecodeError:
            return None
    model = None
    if asked.model.start != NULL:
        if not 0 < asked.model.size <= MOST_MODEL_BYTES:
            return None
        model = PyUnicode_DecodeASCII(<const char*> asked.model.start, asked.model.size, NULL)
    if params:
        model = params.get("model") or model
    prompt = asked.text.tokens + (asked.text.bytes + BYTES_PER_TOKEN - 1) // BYTES_PER_TOKEN
    return new_tuple(Reading, (model, prompt, 1, None if asked.bound < 0 else asked.bound, asked.stream, 0))


# -- the usage of an answer

cdef struct Usage:
    int64_t prompt
    int64_t cached
    int64_t output


cdef bint take_details(Cursor* cursor, int64_t* cached) noexcept nogil:
    """What a count consists of: null, or an object of counts."""
    cdef String name
    cdef int64_t count
    cdef int seen = 0
    cdef int number
    if next_byte(cursor) == c"n":
        return take_word(cursor, "null")
    if not take(cursor, c"{"):
        return False
    if next_byte(cursor) == c"}":
        cursor.at += 1
        return True
    while True:
        if not take_name(cursor, &name) or not take_count(cursor, &count):
            return False
        number = index_of(&name, CACHED, 1, &seen)
        if number == 0:
            cached[0] = count
        elif number == SEEN:
            return False
        if next_byte(cursor) != c",":
            return take(cursor, c"}")
        cursor.at += 1


cdef bint take_usage(Cursor* cursor, Usage* usage) noexcept nogil:
    """A usage with prompt and output, in any order, and what is a part of them."""
    cdef String name
    cdef int64_t ignored
    cdef int seen = 0
    cdef int number
    usage.cached = 0
    if not take(cursor, c"{"):
        return False
    while True:
        if not take_name(cursor, &name):
            return False
        number = index_of(&name, NUMBERS, 5, &seen)
        if number == PROMPT_DETAILS or number == OUTPUT_DETAILS:
            if not take_details(cursor, &usage.cached if number == PROMPT_DETAILS else &ignored):
                return False
        elif number < 0 or not take_count(cursor, &ignored):
            return False
        elif number == PROMPT:
            usage.prompt = ignored
        elif number == OUTPUT:
            usage.output = ignored
        if next_byte(cursor) != c",":
            break
        cursor.at += 1
    return take(cursor, c"}") and seen & 3 == 3


cdef bint take_end(Cursor* cursor) noexcept nogil:
    """Members with plain values, and the end of the answer."""
    cdef String name
    cdef byte c
    while next_byte(cursor) == c",":
        cursor.at += 1
        if not take_name(cursor, &name):
            return False
        c = next_byte(cursor)
        if c == c"{" or c == c"[" or not skip_value(cursor, 0):
            return False
    if not take(cursor, c"}"):
        return False
    next_byte(cursor)
    return True


def skim_usage(bytes body not None):
    """The input, cached and output tokens that an answer in OpenAI's shape reports at its end; None if it does not.

    A usage of counts, then members with plain values, then the end of the answer: a closing brace more, and the usage
    would be that of something in it. The quotes of a name within a string would be escaped.
    """
    cdef Cursor cursor
    cdef Usage usage
    cdef Py_ssize_t at = body.rfind(b'"usage"')
    cdef const byte* start = <const byte*> PyBytes_AS_STRING(body)
    if at < 1 or start[at - 1] == c"\\":
        return None
    cursor.at = start + at + 7
    cursor.ascii = True
    if not take(&cursor, c":") or not take_usage(&cursor, &usage) or not take_end(&cursor):
        return None
    if cursor.at - start != PyBytes_GET_SIZE(body) or not usage.output:
        return None
    usage.cached = min(usage.cached, usage.prompt)
    return usage.prompt - usage.cached, usage.cached, usage.output
