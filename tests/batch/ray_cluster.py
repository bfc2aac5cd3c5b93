"""A Ray cluster in one machine: a head and two machines with a card each. Run by a Python that has Ray.

Prints the cluster's address. A number on standard input kills that machine's Ray; the end of it ends all.
"""

import sys

from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False})
machines = [cluster.add_node(num_cpus=1, num_gpus=1) for _ in range(2)]
cluster.wait_for_nodes()
print(cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(machines[int(line)], allow_graceful=False)
    print("lost", flush=True)
cluster.shutdown()
