"""Markdown that is readable as plain text too."""


def table(header, rows):
    """Returns a table whose columns are aligned."""
    rows = [header, ["---"] * len(header), *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows)


def bullets(sentences):
    """Returns a list with a line for each sentence."""
    return "\n".join(f"- {s}" for s in sentences)
