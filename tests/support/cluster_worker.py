"""A host of a cluster, as a process: it asks as often as it is told to, and writes down each admission.

python cluster_worker.py SETTINGS, a JSON object with `namespace`, `output`, `pause_ms`, `lease_sec`, `state` (a path,
or null) and `quotas` (model -> limits); the store's URL is in MODELQUOTA_REDIS_URL. A line of the output is
``model tokens not_before not_after``, in ns of CLOCK_BOOTTIME. When it is told to end it writes how it took part in
the cluster to the same path with ``.end`` behind it.
"""

import json
import logging
import os
import random
import signal
import sys
import time
from pathlib import Path

from modelquota import ResourceQuotaConfig, ResourceQuotaManager
from modelquota.cluster import RedisStore

LARGEST = 20  # tokens


def main(namespace, output, pause_ms, lease_sec, state, quotas):
    logging.basicConfig(level=logging.DEBUG)  # of everybody, to the standard error
    ends = []
    signal.signal(signal.SIGTERM, lambda *_: ends.append(True))
    chance = random.Random(output)
    store = RedisStore(namespace=namespace, lease_sec=lease_sec, renew_sec=0.2)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with ResourceQuotaManager(path=state, cluster=store) as manager:
        for model_id, limits in quotas.items():
            manager.set_quota(ResourceQuotaConfig.unlimited(model_id, on_violation="reject", **limits))
        meters = {model_id: [meter for meter in quotas if meter.startswith(f"{model_id}#")] for model_id in quotas}
        while not ends:
            for model_id in quotas:
                if "#" in model_id:
                    continue
                tokens = chance.randint(1, LARGEST)
                not_before_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
                if manager.check_quota(model_id, tokens):
                    # when it was admitted lies between the two
                    not_after_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
                    for charged in (model_id, *meters[model_id]):
                        os.write(file, f"{charged} {tokens} {not_before_ns} {not_after_ns}\n".encode())
            time.sleep(pause_ms / 1000)
        status = manager.cluster.status()
    end = {"state": status.state, "renewals": status.renewals, "repr": repr((store, status))}
    Path(f"{output}.end").write_text(json.dumps(end), encoding="utf-8")


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
