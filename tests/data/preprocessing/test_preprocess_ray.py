"""The same bytes from a Ray cluster of several nodes, one of which is killed at work."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing.produce_corpus import PreprocessOptions, preprocess

ROOT = Path(__file__).parents[3]
_ON_A_CLUSTER = """
    import sys, threading, time
    from pathlib import Path
    from ray.cluster_utils import Cluster
    from illada_megatron.data.preprocessing.produce_corpus import PreprocessOptions, preprocess

    if __name__ == "__main__":
        source, prefix, tokenizer = sys.argv[1:]
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        doomed = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()

        def kill():
            while len(list(Path(prefix).parent.glob("*.done.json"))) < 3:
                time.sleep(0.01)
            cluster.remove_node(doomed, allow_graceful=False)
            print("killed a node", flush=True)

        killer = threading.Thread(target=kill)
        killer.start()
        options = PreprocessOptions(
            shard_mb=0.3, engine="ray", ray_address=cluster.address, tokenizer_engine="reference", shuffle_seed=1
        )
        summary = preprocess([source], prefix, tokenizer, options)
        killer.join()
        print(f"{summary.shards} shards", flush=True)
        cluster.shutdown()
"""


@pytest.mark.slow
def test_a_killed_node_changes_nothing(jsonl: Path, huggingface_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl.read_bytes() * 8)
    (tmp_path / "cluster.py").write_text(textwrap.dedent(_ON_A_CLUSTER))
    arguments = [source, tmp_path / "ray" / "out", huggingface_path]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "cluster.py"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "killed a node" in done.stdout
    options = PreprocessOptions(shard_mb=0.3, tokenizer_engine="reference", shuffle_seed=1)
    preprocess([source], tmp_path / "here" / "out", huggingface_path, options)
    made, expected = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("ray", "here"))
    assert len(expected) > 40
    assert made == expected


def test_ray_missing_is_a_message(
    jsonl: Path, sentencepiece_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DataError, match=r"pip install 'illada-megatron\[ray\]'"):
        preprocess([jsonl], tmp_path / "out", sentencepiece_path, PreprocessOptions(engine="ray"))
    assert [path.name for path in tmp_path.iterdir()] == ["out.lock"]
