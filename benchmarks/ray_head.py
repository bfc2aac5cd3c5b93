"""A Ray cluster of this machine alone, which believes to have as many CPUs as it is told. Run by a Python that has Ray.

Prints the cluster's address, and ends when its standard input does.
"""

import sys

from ray.cluster_utils import Cluster

cluster = Cluster(
    initialize_head=True, head_node_args={"num_cpus": int(sys.argv[1]), "num_gpus": 0, "include_dashboard": False}
)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
