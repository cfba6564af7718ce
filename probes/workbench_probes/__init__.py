"""What routing knows: linear probes, clustering and maps of the routing that a trace recorded.

    from workbench import Trace
    from workbench_probes import probe
    probe(Trace("demo.duckdb"), "lang", features=("choices", "tokens"))

Every function takes a trace and returns a tidy table; a missing layer means all layers together.
"""

from workbench_probes.clusters import clusters
from workbench_probes.coefficients import coefficients
from workbench_probes.learning_curve import learning_curve
from workbench_probes.probe import probe
from workbench_probes.sequence_map import sequence_map

__all__ = ["clusters", "coefficients", "learning_curve", "probe", "sequence_map"]
