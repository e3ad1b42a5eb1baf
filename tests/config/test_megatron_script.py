"""Shell scripts as Megatron-LM's users have them, read without running them; bash itself says what is right."""

import shutil
import subprocess

import pytest

from illada_megatron.config.megatron_script import read_script

SCRIPTS = {
    "arrays": 'A=(\n  --lr 1e-4 # peak\n  --bf16\n)\nB=(--save "$1" "$2")\nB+=(--seed 1)\nprogram ${A[@]} "${B[@]}"\n',
    "texts": 'ARGS="\n  --num-layers 2 \\\n  --lr 1e-4\n"\nprogram $ARGS --x "$ARGS"\n',
    "continued": "program --a 1 \\\n  --b '2 3' \\\n  --c \"4\"\n",
    "defaults": 'export N=${NODES:-4}\nP=${1:-"none"}\nprogram --n $N --p ${P} --q ${MISSING:-ab}\n',
    "glued": 'D=/data\nprogram "$D/x_text" $D/y ${D}_z a\\ b \'$D\' "\\$D"\n',
    "added text": 'O="--a 1"\nO+=" --b 2"\nprogram $O\n',
    "several commands": "mkdir -p out && cd out; program --a 1\n",
    "branches": "if true; then\n  A=(--yes)\nfi\nprogram ${A[@]}\n",
    "empty": 'E=\nprogram a $E "" b\n',
}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("case", SCRIPTS)
def test_words_are_bashs(case: str) -> None:
    shown = 'program() { printf "%s\\0" "$@"; }\nmkdir() { :; }\ncd() { :; }\n' + SCRIPTS[case]
    done = subprocess.run(
        ["bash", "-c", shown, "script", "one", "two words"], capture_output=True, text=True, check=True
    )
    command = next(
        words for words in read_script(SCRIPTS[case], ["one", "two words"]).commands if words[0] == "program"
    )
    assert command[1:] == done.stdout.split("\0")[:-1]


def test_what_the_shell_alone_knows_stays_as_it_is_written() -> None:
    script = read_script("W=$(($GPUS * 2))\nprogram --w $W --date $(date +%s) --home ${HOME%/} --x $UNSET\n")
    assert script.commands == [
        ["program", "--w", "$(($GPUS", "*", "2))", "--date", "$(date", "+%s)", "--home", "${HOME%/}", "--x", "$UNSET"]
    ]


def test_a_comment_among_continued_lines_ends_nothing() -> None:
    script = read_script("program --a 1 \\\n  # --b 2 \\\n  --c 3 \\  \n  --d 4\n")
    assert script.commands == [["program", "--a", "1", "--c", "3", "--d", "4"]]


def test_branches_are_told() -> None:
    script = read_script("if [ $X ]; then A=1; else A=2; fi\nfor i in 1 2; do :; done\nprogram $A\n")
    assert script.branches == ["if", "for"]
    assert script.commands[-1] == ["program", "2"]
