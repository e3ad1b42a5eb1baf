"""Fuzzes one format of `formats.py` with atheris (pip install atheris): `make fuzz-formats` runs all.

python tests/fuzz/run_formats.py metadata build/fuzz/metadata -max_total_time=600
"""

import sys
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parents[2])]
with atheris.instrument_imports(include=["illada_megatron", "pickle", "omegaconf", "yaml", "jinja2", "json"]):
    import formats
    from torch._weights_only_unpickler import Unpickler

Unpickler.load = atheris.instrument_func(Unpickler.load)

# Of the whole process; the first is libFuzzer's own measure
_LIMITS = ("-rss_limit_mb=3000", "-timeout=60", "-max_len=4096")


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def main() -> None:
    name, corpus, *options = sys.argv[1:]
    folder = Path(corpus)
    folder.mkdir(parents=True, exist_ok=True)
    for seed, content in formats.FORMATS[name].seeds().items():
        (folder / f"seed-{seed.replace(' ', '-')}").write_bytes(content)
    words = folder.with_name(f"{name}.dict")
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in formats.FORMATS[name].words))
    run = formats.InFolder(name)

    def one(content: bytes) -> None:
        try:
            run(content)
        except formats.Misbehaviour as find:
            raise RuntimeError(str(find)) from find

    for content in formats.FORMATS[name].seeds().values():
        one(content)  # what is loaded at the first time is no find
    atheris.Setup([sys.argv[0], *_LIMITS, f"-dict={words}", f"-artifact_prefix={folder}-", *options, corpus], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
