"""A host of a cluster, as a process: it asks as often as it is told to, and writes the time of each admission.

python cluster_worker.py NAMESPACE OUTPUT PAUSE_MS FIELD=LIMIT...; the store's URL is in MODELQUOTA_REDIS_URL.
"""

import os
import signal
import sys
import time

from modelquota import ResourceQuotaConfig, ResourceQuotaManager
from modelquota.cluster import RedisStore


def main(namespace, output, pause_ms, *fields):
    limits = {name: int(value) for name, value in (field.split("=") for field in fields)}
    ends = []
    signal.signal(signal.SIGTERM, lambda *_: ends.append(True))
    store = RedisStore(namespace=namespace, lease_sec=2, renew_sec=0.2)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with ResourceQuotaManager(cluster=store) as manager:
        manager.set_quota(ResourceQuotaConfig.unlimited("m", on_violation="reject", **limits))
        while not ends:
            began_ns = time.monotonic_ns()
            if manager.check_quota("m", 7):
                # when it was admitted lies between the two
                os.write(file, f"{began_ns} {time.monotonic_ns()}\n".encode())
            time.sleep(float(pause_ms) / 1000)


if __name__ == "__main__":
    main(*sys.argv[1:])
