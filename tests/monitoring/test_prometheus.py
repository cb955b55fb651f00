"""Metrics for Prometheus: scraped over HTTP, parsed by the real parser, right in every figure, and never falling."""

import errno
import json
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import urllib.request
from importlib.resources import files

import pytest
from factories import make_manager, open_quota
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

import modelquota.monitoring.prometheus
from modelquota import ResourceQuotaConfig, Tokens
from modelquota.monitoring.metrics import METRICS, OTHERS
from modelquota.monitoring.prometheus import QuotaCollector, grafana_dashboard, make_exporter_app, start_exporter
from modelquota.quota.limits import WINDOWS
from modelquota.reading.unmetered import unmetered_of

QUOTAS = [
    ResourceQuotaConfig(
        "llama", max_ram_mb=1000, max_ssd_mb=None, max_requests_per_hour=3, max_tokens_per_second=10.5,
        burst_tokens=400, max_concurrent_requests=5, on_violation="reject",
    ),
    ResourceQuotaConfig("qwen", max_tokens_per_hour=100, on_violation="warn"),
]  # fmt: skip


def samples(text):
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, *sorted(sample.labels.items())
            assert key not in found, "a series is exported once"
            found[key] = sample.value
    return found


def scrape(registry):
    from prometheus_client import generate_latest

    return samples(generate_latest(registry).decode())


def registry_of(manager, **settings):
    registry = CollectorRegistry()
    registry.register(QuotaCollector(manager, **settings))
    return registry


@pytest.fixture
def served(manager):
    server, thread = start_exporter(manager, 0)

    def get():
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=30) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain")
            return answer.read().decode()

    yield get
    server.shutdown()
    server.server_close()
    thread.join(30)


def test_an_address_that_cannot_be_had_is_named(manager):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen at 127.0.0.1, port {port}: Address already in use") as caught:
            start_exporter(manager, port)
    assert caught.value.errno == errno.EADDRINUSE
    with pytest.raises(OSError, match="cannot listen at 192.0.2.1, port 0: ") as caught:
        start_exporter(manager, 0, addr="192.0.2.1")
    assert caught.value.errno == errno.EADDRNOTAVAIL


def test_every_figure_of_a_scrape_over_http(manager, served):
    for _ in range(5):
        manager.check_quota("llama", 30)
    for _ in range(4):
        manager.check_quota("qwen", 40)
    manager.check_quota("nobody", 7)
    manager.update_memory_usage("llama", 900, 12)
    manager.update_memory_usage("llama", 600, 10)
    found = samples(served())

    def of(name, **labels):
        return found[(name, *sorted(labels.items()))]

    assert of("modelquota_checks_total") == 10
    assert of("modelquota_admitted_total") == 8
    assert of("modelquota_warned_total") == 2
    assert [of("modelquota_denied_total", action=action) for action in ("reject", "throttle", "queue")] == [2, 0, 0]
    assert of("modelquota_violations_total", type="quota_limit") == 4
    assert of("modelquota_models") == 2
    assert of("modelquota_enforcing") == 1
    llama = {"model": "llama"}
    assert of("modelquota_model_checks_total", **llama) == 5
    assert of("modelquota_model_admitted_total", **llama) == 3
    assert of("modelquota_model_denied_total", **llama, action="reject") == 2
    assert of("modelquota_model_violations_total", **llama, type="quota_limit") == 2
    assert of("modelquota_model_violations_total", **llama, type="ram_limit") == 0
    assert of("modelquota_model_tokens_total", **llama) == 90
    assert of("modelquota_model_warned_total", model="qwen") == 2
    assert of("modelquota_model_window_requests", **llama, window="hour") == 3
    assert of("modelquota_model_window_requests_limit", **llama, window="hour") == 3
    assert of("modelquota_model_window_tokens", **llama, window="second") == 90
    assert of("modelquota_model_window_tokens_limit", **llama, window="second") == 411
    assert of("modelquota_model_window_tokens_limit", **llama, window="day") == 10_000_000
    assert of("modelquota_model_burst_tokens", **llama) == 80
    assert of("modelquota_model_ram_bytes", **llama) == 600 * 2**20
    assert of("modelquota_model_ram_peak_bytes", **llama) == 900 * 2**20
    assert of("modelquota_model_ram_limit_bytes", **llama) == 1000 * 2**20
    assert of("modelquota_model_ssd_bytes", **llama) == 10 * 2**20
    assert ("modelquota_model_ssd_limit_bytes", ("model", "llama")) not in found, "no limit, no series"
    assert of("modelquota_model_concurrent_requests", **llama) == 0
    assert of("modelquota_model_concurrent_requests_limit", **llama) == 5
    assert of("modelquota_model_queue_requests_limit", **llama) == 1000
    assert of("modelquota_model_pressure_ratio", **llama) == 1.0
    assert of("modelquota_model_pressure_ratio", model="qwen") == 1.6
    assert not [key for key in found if ("model", OTHERS) in key], "every model has a label"


def test_types_and_help_reach_prometheus(manager, served):
    families = {family.name: family for family in text_string_to_metric_families(served())}
    alone = [metric for metric in METRICS if not metric.of_cluster]
    assert len(families) == len(alone)
    for metric in alone:
        (family,) = (each for name, each in families.items() if each.documentation == metric.help)
        assert family.type == ("counter" if metric.is_counter else "gauge")
        assert family.name.startswith("modelquota_")


def test_names_that_need_escaping(manager):
    name = 'a"b\\c\nd\x1b{}/ü'
    manager.set_quota(name)
    manager.check_quota(name, 5)
    assert scrape(registry_of(manager))[("modelquota_model_tokens_total", ("model", name))] == 5


def test_beyond_the_bound_those_nearest_to_a_limit_have_a_label_and_the_rest_is_summed(manager):
    for i in range(10):
        manager.set_quota(f"m{i}", max_ram_mb=100)
        manager.update_memory_usage(f"m{i}", 10 * i, 1)
        manager.check_quota(f"m{i}", i)
    found = scrape(registry_of(manager, max_models=3))
    labelled = {dict(labels)["model"] for _, *labels in found if dict(labels).get("model")}
    assert labelled == {"m7", "m8", "m9", OTHERS}
    assert found[("modelquota_model_tokens_total", ("model", OTHERS))] == sum(range(7))
    assert found[("modelquota_model_ram_bytes", ("model", OTHERS))] == 10 * sum(range(7)) * 2**20
    assert found[("modelquota_model_pressure_ratio", ("model", OTHERS))] == pytest.approx(0.6)
    assert ("modelquota_model_ram_limit_bytes", ("model", OTHERS)) not in found
    found = scrape(registry_of(manager, max_models=0))
    assert found[("modelquota_model_tokens_total", ("model", OTHERS))] == sum(range(10))


def test_a_model_of_the_common_name_is_among_the_others(manager):
    manager.set_quota(OTHERS)
    manager.check_quota(OTHERS, 11)
    found = scrape(registry_of(manager))
    assert found[("modelquota_model_tokens_total", ("model", OTHERS))] == 11
    assert found[("modelquota_model_tokens_total", ("model", "llama"))] == 0


def test_counters_never_fall_and_lose_nothing_however_models_change_places(manager):
    """Ranks change, models come, go and come back: every series only grows, and together they are what was counted."""
    rng = random.Random(7)
    registry = registry_of(manager, max_models=3)
    names = [f"m{i}" for i in range(8)]
    for name in names:
        manager.set_quota(name, max_ram_mb=100)
    before, charged = {}, 0
    for round_ in range(200):
        name = rng.choice(names)
        if round_ % 10 == 9:
            scraped = scrape(registry)  # a model removed between two scrapes is in the totals only
            assert scraped is not None
            manager.remove_quota(name)
            manager.set_quota(name, max_ram_mb=100)
        for name in names:
            manager.update_memory_usage(name, rng.randrange(100), 0)
            tokens = rng.randrange(50)
            charged += tokens if manager.check_quota(name, tokens) else 0
        found = scrape(registry)
        for key, value in found.items():
            if key[0].endswith("_total"):
                assert value >= before.get(key, 0), key
        before |= {key: value for key, value in found.items() if key[0].endswith("_total")}
        manager.clock.advance(60)
    told = found[("modelquota_model_tokens_total", ("model", OTHERS))]
    assert 0 < told < charged


def test_labels_together_tell_all_that_was_counted(manager):
    registry = registry_of(manager, max_models=2)
    names = [f"m{i}" for i in range(6)]
    for name in names:
        manager.set_quota(name, max_ram_mb=100, max_tokens_per_second=None)
    rng = random.Random(3)
    told, charged, last = 0.0, 0, {}
    for _ in range(60):
        for name in names:
            manager.update_memory_usage(name, rng.randrange(100), 0)
            charged += 20 if manager.check_quota(name, 20) else 0
        found = {key: value for key, value in scrape(registry).items() if key[0] == "modelquota_model_tokens_total"}
        told += sum(value - last.get(key, 0) for key, value in found.items())
        last |= found
        manager.clock.advance(5)
    assert told == charged


def test_an_id_that_comes_back_goes_on_counting_and_so_do_the_totals(manager):
    registry = registry_of(manager)
    manager.check_quota("llama", 9)
    assert scrape(registry)[("modelquota_model_tokens_total", ("model", "llama"))] == 9
    manager.remove_quota("llama")
    found = scrape(registry)
    assert ("modelquota_model_tokens_total", ("model", "llama")) not in found
    assert found[("modelquota_checks_total",)] == 1
    manager.set_quota("llama")
    manager.check_quota("llama", 4)
    found = scrape(registry)
    assert found[("modelquota_model_tokens_total", ("model", "llama"))] == 13, "a counter never falls"
    assert found[("modelquota_checks_total",)] == 2


def test_scrapes_from_several_threads_while_models_are_checked(manager):
    app = make_exporter_app(manager, max_models=1)
    bodies, stop = [], threading.Event()

    def get():
        for _ in range(20):
            bodies.append(
                b"".join(app({"REQUEST_METHOD": "GET", "PATH_INFO": "/metrics"}, lambda status, headers: None)).decode()
            )

    def work():
        while not stop.is_set():
            manager.check_quota("qwen", 1)

    threads = [threading.Thread(target=get) for _ in range(3)]
    worker = threading.Thread(target=work)
    for thread in (worker, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    worker.join()
    assert len(bodies) == 60
    for body in bodies:
        assert samples(body)[("modelquota_models",)] == 2


def test_a_negative_bound_is_refused(manager):
    with pytest.raises(ValueError, match="max_models is -1; give an integer, 0 or more"):
        QuotaCollector(manager, max_models=-1)


def test_the_dashboard_asks_only_for_metrics_that_there_are(manager):
    dashboard = json.loads(grafana_dashboard())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [variable["definition"] for variable in dashboard["templating"]["list"] if "definition" in variable]
    asked = {name for expression in expressions for name in re.findall(r"modelquota_\w+", expression)}
    manager.check_quota("llama", 1)
    assert asked
    assert {name for name in asked if not name.startswith("modelquota_cluster_")} <= {
        key[0] for key in scrape(registry_of(manager))
    }
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    labels = {"model", *(label for metric in METRICS for label in metric.labels)}
    for expression in expressions:
        assert set(re.findall(r"by \((\w+)\)", expression)) <= labels
        assert expression.count("(") == expression.count(")")


def test_the_dashboard_shows_every_window_longer_than_a_second_and_names_none(manager):
    panels = json.loads(grafana_dashboard())["panels"]
    texts = [panel["title"] for panel in panels] + [target["expr"] for panel in panels for target in panel["targets"]]
    (excluded,) = re.findall(r'modelquota_model_window_tokens\{[^}]*window!="(\w+)"\}', "\n".join(texts))
    windows = {dict(key[1:])["window"] for key in scrape(registry_of(manager)) if key[0].endswith("_window_tokens")}
    longer = {window.name for window in WINDOWS if window.seconds > 1}
    assert windows - {excluded} == longer
    assert not [text for text in texts for name in longer if re.search(rf"\b{name}\b", text)]


def test_the_documentation_names_only_metrics_that_there_are(manager):
    unmetered_of(manager).count("/generate", "no route covers it")
    exported = {key[0] for key in scrape(registry_of(manager))}
    topic = files("modelquota.docs").joinpath("metrics.md").read_text(encoding="utf-8")
    for text in (topic, modelquota.monitoring.prometheus.__doc__):
        named = set(re.findall(r"\bmodelquota_[a-z_]*[a-z]\b", text))
        assert named
        assert {name for name in named if not name.startswith("modelquota_cluster_")} <= exported


def test_without_the_extra_it_says_what_to_install():
    code = "import sys; sys.modules['prometheus_client'] = None; import modelquota.monitoring.prometheus"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.endswith(
        "ImportError: this needs the extra 'prometheus': pip install 'modelquota[prometheus]'\n"
    )


def test_labels_are_bounded_over_the_life_of_a_process(manager):
    """Users come, count and go: the label takes few values, no series falls, and together they count everything."""
    registry = registry_of(manager, max_models=5)
    rng = random.Random(11)
    labels, last, told, charged = set(), {}, 0.0, 0
    for round_ in range(60):
        users = [f"user-{round_}-{i}" for i in range(8)] + [f"regular-{i}" for i in range(3)]
        for user in users:
            manager.set_quota(user, max_ram_mb=100)
            manager.update_memory_usage(user, rng.randrange(100), 0)
            charged += 20 if manager.check_quota(user, 20) else 0
        found = {key: value for key, value in scrape(registry).items() if key[0].startswith("modelquota_model_")}
        labels |= {dict(key[1:])["model"] for key in found}
        for key, value in found.items():
            if key[0].endswith("_total"):
                assert value >= last.get(key, 0), key
        tokens = {key: value for key, value in found.items() if key[0] == "modelquota_model_tokens_total"}
        told += sum(value - last.get(key, 0) for key, value in tokens.items())
        last |= found
        for user in users:
            if rng.random() < 0.9:
                manager.remove_quota(user)
        manager.clock.advance(60)
    assert len(labels) == 6
    assert OTHERS in labels
    assert told == charged


def test_labels_that_are_left_are_given_later_and_stay_with_their_id(manager):
    registry = registry_of(manager, max_models=3)

    def own():
        return {dict(labels)["model"] for name, *labels in scrape(registry) if name == "modelquota_model_ram_bytes"}

    assert own() == {"llama", "qwen"}
    for name, ram_mb in (("low", 10), ("high", 90)):
        manager.set_quota(name, max_ram_mb=100)
        manager.update_memory_usage(name, ram_mb, 0)
    assert own() == {"llama", "qwen", "high", OTHERS}
    manager.remove_quota("llama")
    manager.update_memory_usage("low", 100, 0)
    assert own() == {"qwen", "high", OTHERS}
    manager.set_quota("llama")
    assert own() == {"llama", "qwen", "high", OTHERS}


def test_clients_that_leave_are_no_error_of_the_exporter(manager, capfd):
    for i in range(500):
        manager.set_quota(f"model-{i}")
    server, thread = start_exporter(manager, 0, max_models=500)
    left = threading.Semaphore(0)
    finish = server.shutdown_request

    def shutdown_request(request):
        finish(request)
        left.release()

    server.shutdown_request = shutdown_request
    requests = (b"", b"GET /met", b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    for request in requests:
        with socket.create_connection(("127.0.0.1", server.server_port)) as client:
            client.sendall(request)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # it resets the connection
    for _ in requests:
        assert left.acquire(timeout=30)
    assert capfd.readouterr() == ("", "")
    try:
        raise ValueError("a fault of the server")
    except ValueError:
        server.handle_error(None, ("127.0.0.1", 1))
    assert "a fault of the server" in capfd.readouterr().err
    server.shutdown()
    server.server_close()
    thread.join(30)


def test_a_meter_has_the_label_of_its_id():
    manager = make_manager(open_quota("m"), open_quota("m#out", token_weights=(0, 0, 1), max_tokens_per_hour=100))
    assert manager.check_quota("m", Tokens(3, 2, 1))
    registry = CollectorRegistry()
    registry.register(QuotaCollector(manager))
    tokens = [registry.get_sample_value("modelquota_model_tokens_total", {"model": name}) for name in ("m", "m#out")]
    assert tokens == [6, 1]
    labels = {"model": "m#out", "window": "hour"}
    assert registry.get_sample_value("modelquota_model_window_tokens_limit", labels) == 100
