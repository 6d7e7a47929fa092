"""Plain text out of Python sources, package metadata and manual pages. Pure functions of the file's text."""

import ast
import email.parser
import re
import warnings
from collections.abc import Iterator

DocumentedNode = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

# ---- Python sources


def parse(source: str) -> ast.Module:
    """The syntax tree; raises SyntaxError (also for NUL characters and nesting too deep for the parser)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old packages
        try:
            return ast.parse(source)
        except (ValueError, RecursionError, MemoryError) as error:
            raise SyntaxError(str(error)) from None


def docstring_place(node: DocumentedNode) -> ast.Constant | None:
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return first.value
    return None


def without_docstrings(source: str) -> str:
    """The same program with every docstring cut out, `pass` where nothing else would be left. Raises SyntaxError."""
    cuts = []
    for node in ast.walk(parse(source)):
        if isinstance(node, DocumentedNode) and (docstring := docstring_place(node)):
            cuts.append((docstring, len(node.body) == 1 and not isinstance(node, ast.Module)))
    lines = source.encode().splitlines(keepends=True)  # the tree's columns count bytes
    line_starts = [0]
    for line in lines:
        line_starts.append(line_starts[-1] + len(line))
    data = source.encode()
    for docstring, is_whole_body in sorted(cuts, key=lambda cut: -cut[0].lineno):
        start = line_starts[docstring.lineno - 1] + docstring.col_offset
        end = line_starts[(docstring.end_lineno or 0) - 1] + (docstring.end_col_offset or 0)
        before, after = data[:start], data[end:]
        if is_whole_body:
            data = before + b"pass" + after
        elif match := re.match(rb"[ \t]*;[ \t]*", after):  # another statement on the docstring's line
            data = before + after[match.end() :]
        elif match := re.match(rb"[ \t]*\n(?:[ \t]*\n)*", after):  # nothing else on its lines: take them out whole
            data = before.rstrip(b" \t") + after[match.end() :]
        else:
            data = before + after.lstrip(b" \t")
    return data.decode()


def docstrings(source: str, module: str) -> str:
    """The module's docstrings in order, under its name, each under the qualified name of what it documents.

    Empty for a module without docstrings. Raises SyntaxError.
    """
    texts = [f"{name}\n\n{text}" if name else text for name, text in documented(parse(source))]
    return "\n\n".join([module, *texts]) if texts else ""


def documented(node: ast.AST, name: str = "") -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of everything in the tree that has one."""
    if isinstance(node, DocumentedNode) and (text := (ast.get_docstring(node) or "").strip()):
        yield name, text
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            continue  # no definition stands inside an expression
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from documented(child, f"{name}.{child.name}".lstrip("."))
        else:
            yield from documented(child, name)


def help_topics(source: str) -> dict[str, str]:
    """The texts in pydoc_data/topics.py by name. Raises SyntaxError if the file does not assign a dict of strings."""
    for statement in parse(source).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            return dict(ast.literal_eval(statement.value))
    raise SyntaxError("no dict of topics")


# ---- package metadata


def long_description(metadata: str) -> str:
    """The README inside a dist-info METADATA file; empty where there is none."""
    message = email.parser.Parser().parsestr(metadata)
    body = message.get_payload()
    if isinstance(body, str) and body.strip():
        return body
    folded = message.get("Description", "")  # metadata before version 2.1: in a header, with a margin on each line
    return re.sub(r"\n(?: {7}\|| {8})", "\n", folded)


# ---- manual pages

SPECIAL_CHARACTERS = {
    "aq": "'", "dq": '"', "oq": "'", "cq": "'", "lq": '"', "rq": '"', "ga": "`", "ha": "^", "ti": "~", "rs": "\\",
    "bu": "*", "em": "--", "en": "-", "hy": "-", "mi": "-", "pl": "+", "eq": "=", "mu": "x", "sl": "/", "ba": "|",
    "co": "(c)", "rg": "(R)", "tm": "(TM)", "->": "->", "<-": "<-", "=>": "=>", "<=": "<=", ">=": ">=", "!=": "!=",
    "la": "<", "ra": ">", "lB": "[", "rB": "]", "lC": "{", "rC": "}", "at": "@", "sh": "#", "Do": "$", "Po": "GBP",
    "ct": "c", "de": " degrees", "+-": "+/-", "**": "*", "if": "infinity", "pc": ".", "fo": "'", "fc": "'", "or": "|",
    "R": "(R)", "Tm": "(TM)", "L\"": '"', "R\"": '"', "C`": "", "C'": "", "C+": "C++", "Q": '"', "U": '"', "--": "--",
}  # fmt: skip

ESCAPE = re.compile(
    r"""\\(?:
        f(?:\[[^\]]*\]|\(..|.)                 # font
      | s(?:[-+]?\d{1,2}|[-+]?\[[^\]]*\]|\(\d\d)  # size
      | [mMFnYVgO](?:\[[^\]]*\]|\(..|.)        # colour, family, registers
      | [hvwlLDbxXZoNACRBSHp](?:'[^']*')       # motion, width, lines, drawing
      | \*(?:\[(?P<string_long>[^\]\s]*)[^\]]*\]|\((?P<string_two>..)|(?P<string_one>.))
      | \((?P<two>..)
      | \[u(?P<unicode>[0-9A-Fa-f]{4,6})\]
      | \[(?P<long>[^\]]*)\]
      | ["\#].*                                # comment
      | (?P<one>.)
      | $                                      # continued line
    )""",
    re.VERBOSE,
)
SINGLE_ESCAPES = {
    "-": "-", " ": " ", "~": " ", "0": " ", "e": "\\", "\\": "\\", "'": "'", "`": "`", ".": ".", "t": "\t",
}  # fmt: skip

HEADINGS = {"SH", "SS", "Sh", "Ss"}
BREAKS = {"PP", "P", "LP", "HP", "TP", "TQ", "RS", "RE", "sp", "Pp", "Bl", "El", "Bd", "Ed", "bp", "SY", "YS", "Lp"}
JOINED_FONTS = {"BR", "RB", "BI", "IB", "IR", "RI"}  # arguments change fonts and stand without spaces
FONTS = {"B", "I", "R", "SM", "SB", "CW", "UR", "MT"}
VERBATIM_STARTS, VERBATIM_ENDS = {"nf", "EX", "Bd", "TS", "Vb"}, {"fi", "EE", "Ed", "TE", "Ve"}
BULLETS = {"*", "o", "-", "+"}
MDOC_MARKS = {
    "Fl": "-", "Aq": "<>", "Bq": "[]", "Brq": "{}", "Dq": '""', "Op": "[]", "Pq": "()", "Ql": "''", "Sq": "''",
    "Qq": '""', "Oo": "[", "Po": "(", "Bo": "[", "Ao": "<", "Do": '"', "Qo": '"', "So": "'",
}  # fmt: skip
MDOC_CLOSERS = {"Oc": "]", "Pc": ")", "Bc": "]", "Ac": ">", "Dc": '"', "Qc": '"', "Sc": "'"}
MDOC_WORDS = {
    "Ad", "An", "Ap", "Ar", "At", "Bsx", "Bx", "Cd", "Cm", "Dl", "Dv", "D1", "Em", "Er", "Ev", "Fa", "Fd", "Fn", "Fo",
    "Ft", "Fx", "Ic", "In", "It", "Lb", "Li", "Lk", "Mt", "Nd", "Nm", "No", "Ns", "Nx", "Ox", "Pa", "Rv", "St", "Sx",
    "Sy", "Tn", "Ux", "Va", "Vt", "Xr", *MDOC_CLOSERS,
}  # fmt: skip
COMMENT = re.compile(r'\\["#].*')
ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|(\S+)')


def unescape(text: str) -> str:
    """Text of a roff line with its escapes replaced or taken out."""
    return ESCAPE.sub(replacement, text) if "\\" in text else text


def replacement(match: re.Match[str]) -> str:
    if name := match["two"] or match["long"] or match["string_long"] or match["string_two"] or match["string_one"]:
        return SPECIAL_CHARACTERS.get(name, "")
    if match["unicode"]:
        return chr(int(match["unicode"], 16))
    return SINGLE_ESCAPES.get(match["one"] or "", "")


def arguments(text: str) -> list[str]:
    return [(quoted or bare).replace('""', '"') for quoted, bare in ARGUMENT.findall(text)]


def manual_page(page: str) -> str | None:
    """Text of a roff manual page (man or mdoc macros): headings and paragraphs, each paragraph on one line.

    None when the page is only a pointer to another (`.so`). Tables and examples keep their lines; definitions of
    macros, conditions other than "is a terminal", drawings and equations are left out.
    """
    out: list[str] = []  # finished lines
    paragraph: list[str] = []
    verbatim = False
    tag_follows = False
    title = ""

    def end_paragraph(blank: bool = True) -> None:
        if paragraph:
            out.append(re.sub(r"[ \t]+", " ", " ".join(paragraph)).strip())
            paragraph.clear()
        if blank and out and out[-1]:
            out.append("")

    def add(text: str) -> None:
        if verbatim:
            out.append(text.rstrip())
        elif text.strip():
            paragraph.append(text.strip())
        else:
            end_paragraph()

    def end_tag() -> None:
        """The tag of a list entry stands on its own line, unless it is a bullet."""
        nonlocal tag_follows
        if tag_follows and paragraph:
            tag_follows = False
            if paragraph[0] not in BULLETS:
                end_paragraph(blank=False)

    lines = iter(page.splitlines())
    heading_follows = False
    for line in lines:
        if line.startswith((".ie n ", ".if n ")) and "\\{" not in line:
            line = line[6:].lstrip()
        if not line.startswith((".", "'")):
            text = unescape(line)
            if heading_follows and text.strip():
                out.append(text.strip())
                heading_follows = False
                end_paragraph()
                continue
            add(re.sub(r"T[{}]", "", text) if verbatim else text)
            end_tag()
            continue
        request, _, rest = COMMENT.sub("", line[1:]).strip().replace("\t", " ", 1).partition(" ")
        if request.startswith(("\\", "tr")) or not request:
            continue
        if request in ("de", "de1", "am", "ig"):
            end = "." + (arguments(rest)[1] if len(arguments(rest)) > 1 and request != "ig" else ".")
            while next(lines, end).strip() != end:
                pass
        elif request in ("if", "ie", "el", "while"):
            depth = line.count("\\{") - line.count("\\}")
            while depth > 0 and (inner := next(lines, None)) is not None:
                depth += inner.count("\\{") - inner.count("\\}")
        elif request == "so":
            return None
        elif request in ("TH", "Dt"):
            name, section = ([*arguments(unescape(rest)), "", ""])[:2]
            title = title or (f"{name}({section})" if name else "")
        elif request in HEADINGS:
            end_paragraph()
            verbatim = False
            words = arguments(unescape(rest))
            heading_follows = not words
            if words:
                out += [" ".join(words), ""]
        elif request in VERBATIM_STARTS:
            end_paragraph()
            verbatim = True
            if request == "TS":  # the table's format, up to the line that ends with a full stop
                while (inner := next(lines, ".")).strip() and not inner.rstrip().endswith("."):
                    pass
        elif request in VERBATIM_ENDS:
            verbatim = False
            end_paragraph()
        elif request in BREAKS:
            end_paragraph()
            tag_follows = request in ("TP", "TQ")
        elif request == "br":
            end_paragraph(blank=False)
        elif request == "IP":
            end_paragraph()
            if words := arguments(unescape(rest)):
                (paragraph if words[0] in BULLETS else out).append(words[0])
        elif request == "EQ":
            while not next(lines, ".EN").startswith(".EN"):
                pass
        elif request in JOINED_FONTS:
            add("".join(arguments(unescape(rest))))
        elif request in FONTS:
            add(" ".join(arguments(unescape(rest))))
        elif request in MDOC_MARKS or request in MDOC_WORDS:
            if request == "It":
                end_paragraph()
            add(mdoc_words(unescape(line[1:]), title))
            tag_follows |= request == "It"
        if request in JOINED_FONTS or request in FONTS or request == "It":
            end_tag()
    end_paragraph()
    text = re.sub(r"\n{3,}", "\n\n", "\n".join([title, "", *out] if title else out))
    return text.strip() + "\n"


def mdoc_words(line: str, title: str) -> str:
    """One line of mdoc macros, which may call each other: `Op Fl v Ar file` is `[-v file]`."""
    words: list[str] = []
    closing = ""
    prefix = ""
    tokens = arguments(line)
    for i, token in enumerate(tokens):
        if token in MDOC_MARKS:
            mark = MDOC_MARKS[token]
            prefix += mark[0]
            closing = mark[1:] + closing
        elif token == "Nm" and i == len(tokens) - 1:
            words.append(prefix + title.partition("(")[0].lower())
            prefix = ""
        elif token == "Nd":
            words.append("--")
        elif token in MDOC_CLOSERS and words:
            words[-1] += MDOC_CLOSERS[token]
        elif token in MDOC_WORDS:
            continue
        elif token in (".", ",", ";", ":", ")", "]") and words:
            words[-1] += token
        elif i >= 2 and tokens[i - 2] == "Xr" and token.isalnum():
            words[-1] += f"({token})"
        else:
            words.append(prefix + token)
            prefix = ""
    if prefix:
        words.append(prefix)
    return " ".join(words) + closing
