"""What the programs in tools/ and evals/ share: flags, the message for a mistake, tables. It starts without torch."""

import argparse
import os
import sys
import warnings
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table


def fail(message):
    """End the program (SystemExit) with one message and exit status 1."""
    sys.exit(f"error: {message}")


def start(main):
    """main(), as a program: Ctrl+C and a reader that has gone (| head) end it without a traceback."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries to one another
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed to nowhere
        sys.exit(1)


def flag_parser(doc):
    """A parser of flags with `doc` as its help; a mistake in them ends the program with one message."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = fail
    return parser


def parse_beside_recipe(parser, argv):
    """-> (the tool's own arguments, the recipe's flags)."""
    args, recipe_flags = parser.parse_known_args(argv)
    return args, underscored(recipe_flags)


def underscored(flags):
    """The recipe's flags as its fields are named: its parser takes --dataset-name for --dataset_name, too."""
    renamed = []
    for flag in flags:
        if flag.startswith("--"):
            name, equals, value = flag.removeprefix("--").partition("=")
            flag = f"--{name.replace('-', '_')}{equals}{value}"
        renamed.append(flag)
    return renamed


def run_labels(runs):
    """Folders -> how each is shown: its name, or its path where several have that name. Raises SystemExit for one
    that is given twice."""
    for run, count in Counter(map(os.path.realpath, runs)).items():
        if count > 1:
            fail(f"{run} is given twice")
    names = [Path(run).absolute().name for run in runs]
    return [str(run) if names.count(name) > 1 else name for run, name in zip(runs, names)]


def text_table(*columns, left=1, longest_cell=None, **style):
    """A rich table without lines: the first `left` columns to the left, the others to the right. Cells are cut after
    `longest_cell` characters, where it is given."""
    table = Table(box=None, pad_edge=False, **style)
    for number, column in enumerate(columns):
        justify = "left" if number < left else "right"
        if longest_cell:
            table.add_column(column, justify=justify, no_wrap=True, overflow="ellipsis", max_width=longest_cell)
        else:
            table.add_column(column, justify=justify, overflow="fold")
    return table


def print_table(table):
    """A table of other people's texts, as they are; not cut to the width of the screen."""
    Console(width=10_000, markup=False, emoji=False, highlight=False).print(table)
