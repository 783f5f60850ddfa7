#!/usr/bin/env python3
"""Prints measurements as a markdown table of medians.

    bench.py RESULTS HEADING [--ratio LABEL=COLUMN/COLUMN]... [--digits N] [--only COLUMN,...]

RESULTS has lines "row TAB column TAB value", several of one row and column for several rounds. A ratio is the median of the
rounds' ratios, of neighbours in time, not the ratio of the medians.
"""

import statistics
import sys


def main():
    arguments = sys.argv[1:]
    path, heading = arguments[:2]
    ratios, digits, only = [], 2, None
    rest = iter(arguments[2:])
    for option in rest:
        value = next(rest)
        if option == "--ratio":
            label, pair = value.split("=")
            ratios.append((label, *pair.split("/")))
        elif option == "--digits":
            digits = int(value)
        elif option == "--only":
            only = value.split(",")
    rows, columns, values = [], [], {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            row, column, value = line.rstrip("\n").split("\t")
            if row not in rows:
                rows.append(row)
            if column not in columns:
                columns.append(column)
            values.setdefault((row, column), []).append(value)
    columns = [c for c in columns if only is None or c in only]

    def cell(found):
        try:
            numbers = [float(v) for v in found]
        except ValueError:
            return found[-1]
        spread = f" ({min(numbers):.{digits}f}–{max(numbers):.{digits}f})" if len(numbers) > 1 and min(numbers) != max(numbers) else ""
        return f"{statistics.median(numbers):.{digits}f}{spread}"

    print("| " + " | ".join([heading, *columns, *(label for label, *_ in ratios)]) + " |")
    print("|---|" + "---:|" * (len(columns) + len(ratios)))
    for row in rows:
        cells = [cell(values[row, c]) if (row, c) in values else "–" for c in columns]
        for _, above, below in ratios:
            # A delay of nothing has no ratio.
            pairs = [(a, b) for a, b in zip(values.get((row, above), []), values.get((row, below), [])) if float(b) > 0]
            cells.append(f"**{statistics.median(float(a) / float(b) for a, b in pairs):.2f}**" if pairs else "–")
        print("| " + " | ".join([row, *cells]) + " |")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main()
