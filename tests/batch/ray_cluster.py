"""A Ray cluster in one machine: a head and another, with a card each as Ray believes. Run by a Python that has Ray.

Prints the cluster's address. A line on standard input kills Ray on the other machine; the end of it ends all.
"""

import sys

from ray.cluster_utils import Cluster

# Processes that Ray starts in advance: the workers here need others, with the run's code.
QUICK = {"enable_worker_prestart": False, "prestart_worker_first_driver": False}
HEAD = {"num_cpus": 1, "num_gpus": 1, "include_dashboard": False, "_system_config": QUICK}
cluster = Cluster(initialize_head=True, head_node_args=HEAD)
other = cluster.add_node(num_cpus=1, num_gpus=1)
cluster.wait_for_nodes()
print(cluster.address, flush=True)
for _ in sys.stdin:
    cluster.remove_node(other, allow_graceful=False)
    print("lost", flush=True)
cluster.shutdown()
