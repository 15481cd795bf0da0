"""Runs a script of benchmarks/ on tiny versions of its models: python tests/tiny_benchmark.py SCRIPT ARGUMENTS…"""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
sys.path[:0] = [str(folder) for folder in (BENCHMARKS, ROOT / "tests", ROOT / "examples" / "tiny")]

import peers  # noqa: E402
from test_latency import shrink  # noqa: E402

peers.PEERS = tuple(shrink(peer) for peer in peers.PEERS if "FastVLM" not in peer.name)
peers.PEERS[0].config["text_config"]["intermediate_size"] = 64  # four bits come in groups of 32
for file in BENCHMARKS.glob("*.py"):
    if file.stem != "peers":
        sys.modules.pop(file.stem, None)  # those that have the large models already

import latency  # noqa: E402
import step_cost  # noqa: E402

latency.CEILING_SIZES["cpu"] = (64, 2**16)
step_cost.ROWS["cpu"] = (1, 2)
for part in ("text_config", "vision_config"):
    step_cost.SMALL[part]["num_hidden_layers"] = 3
build_config = step_cost.build_config
step_cost.build_config = lambda case, _size: build_config(case, "small")

script = Path(sys.argv.pop(1))
importlib.import_module(script.stem).main()
