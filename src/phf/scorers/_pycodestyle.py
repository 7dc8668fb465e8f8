"""pycodestyle's default checks with the same results in half the time or less.

pycodestyle spends most of its time passing every logical line to every check. Here a guard calls a check only where
the check can report something. Each guard is *sound*: where it skips a check, the check would have reported nothing.
This follows from what the check looks for, which is next to the guard, and is tested against pycodestyle itself. A
logical line with a token that the tokenizer could not read goes to pycodestyle's own code. A check that is unknown
here, from a later version, is always called. No check's own logic is repeated here.
"""

from __future__ import annotations

import bisect
import functools
import keyword
import re
import tokenize
from typing import Any

import pycodestyle
from pycodestyle import noqa

_NAMES_THAT_MATTER = frozenset([*keyword.kwlist, "l", "O", "I"])
_WORD_OPERATORS = frozenset(["and", "in", "is", "or"])
_CALL_SPACE = re.compile(r"[\w}\])] [(\[]")
# Places where a space may be missing on a line with single spaces only: after , ; : or next to an operator.
_TIGHT = re.compile(r"[,;:][^ ]|[-+*/%<>&|^@=!][^ ]|[^ ][-+*/%<>&|^@=!]")
_BRACKETS = re.compile(r"[()\[\]{}]|=")
_CLOSING = {")": "(", "]": "[", "}": "{"}

_FANCY_STRINGS = {getattr(pycodestyle, f"{kind}STRING_{end}") for kind in "FT" for end in ("START", "END")}
_MAY_END_A_LINE = {tokenize.NEWLINE, tokenize.NL, tokenize.STRING} | _FANCY_STRINGS

KNOWN_LOGICAL = frozenset(
    [
        "ambiguous_identifier",
        "bare_except",
        "blank_lines",
        "comparison_negative",
        "comparison_to_singleton",
        "comparison_type",
        "compound_statements",
        "continued_indentation",
        "explicit_line_join",
        "extraneous_whitespace",
        "imports_on_separate_lines",
        "indentation",
        "maximum_doc_length",
        "missing_whitespace",
        "missing_whitespace_after_keyword",
        "module_imports_on_top_of_file",
        "python_3000_invalid_escape_sequence",
        "whitespace_around_keywords",
        "whitespace_around_named_parameter_equals",
        "whitespace_around_operator",
        "whitespace_before_comment",
        "whitespace_before_parameters",
    ]
)
KNOWN_PHYSICAL = frozenset(
    ["maximum_line_length", "tabs_obsolete", "tabs_or_spaces", "trailing_blank_lines", "trailing_whitespace"]
)


def _tight_arguments_only(line: str) -> bool:
    """Whether pycodestyle accepts every place in `line` where a space may be missing: `name=value` directly inside
    parentheses; `,)` and `,]`; a unary sign or star after an opening bracket, a comma, `=` or `:`."""
    stack: list[str] = []
    inside: dict[int, bool] = {}
    for match in _BRACKETS.finditer(line):
        char = match.group()
        if char == "=":
            inside[match.start()] = bool(stack) and stack[-1] == "("
        elif char in "([{":
            stack.append(char)
        elif stack and stack[-1] == _CLOSING[char]:
            stack.pop()
        else:
            return False
    at = 0
    while (tight := _TIGHT.search(line, at)) is not None:
        start = tight.start()
        first = line[start]
        second = line[start + 1]
        if first == "," and second in ")]":
            at = start + 1
        elif second in "-*" and first in "([{":  # f(-1), f(*a), [**b]
            at = start + 2
            if line[at : at + 1] == second == "*":
                at += 1
            if not _begins_value(line[at : at + 1]):
                return False
        elif first in "-*" and line[start - 2 : start] in (", ", "= ", ": ") and start >= 2:  # a, -1   x = -1   a, *b
            at = start + 1
            if line[at : at + 1] == first == "*":
                at += 1
            if not _begins_value(line[at : at + 1]):
                return False
        elif second == "=" and inside.get(start + 1) and (first.isalnum() or first == "_"):  # f(a=1)
            at = start + 2
            after = line[at : at + 1]
            if after in ("-", "*") and line[at + 1 : at + 2].isalnum():
                at += 1
            elif not _begins_value(after):
                return False
        else:
            return False
    return True


def _begins_value(char: str) -> bool:
    return char.isalnum() or char in ("_", '"', "'", "(", "[", "{")


def _tables(options: Any) -> tuple[dict[str, Any], list[Any], bool]:
    """Logical checks by name, the names that are unknown here, and whether the physical checks are the known ones.
    Kept in the options, because a checker lives for one text."""
    if not hasattr(options, "phf_tables"):
        logical = {name: (check, names) for name, check, names in options.logical_checks}
        unknown = [name for name in logical if name not in KNOWN_LOGICAL]
        known = {check[0] for check in options.physical_checks} == KNOWN_PHYSICAL and options.max_line_length == 79
        options.phf_tables = logical, unknown, known
    found: tuple[dict[str, Any], list[Any], bool] = options.phf_tables
    return found


class Checker(pycodestyle.Checker):  # type: ignore[misc]
    """A `pycodestyle.Checker` whose `check_all` reports the same violations, perhaps in another order within a line."""

    def __init__(self, lines: list[str], options: Any, report: Any) -> None:
        super().__init__(lines=lines, options=options, report=report)
        self._logical, self._unknown_logical, self._guarded_physical = _tables(options)
        self.tokens: list[Any] = []
        self.blank_lines = self.blank_before = self.previous_indent_level = 0
        self.previous_logical = self.previous_unindented_logical_line = ""
        self._odd_token = self._comments = self._fancy_string = False
        self._strings: list[Any] = []
        self._ambiguous = self._tight_keyword = self._tight_operator = False
        self._noqa_line: str | None = None  # the line that decides `noqa`; read when a check asks

    def check_physical(self, line: str) -> None:
        if (
            self._guarded_physical
            and not (
                # E101, W191: a tab, or an indentation in a file that is not indented by spaces
                "\t" in line
                or (self.indent_char != " " and line[:1] == " ")
                # E501
                or len(line) > 79
                # W391, W292
                or self.line_number == self.total_lines
                # W291, W293: the character before the line's end
                or line.rstrip("\n\r\x0c")[-1:] in (" ", "\v")
            )
        ):
            return
        if self._noqa_line is not None:
            self.noqa = self._noqa_line and noqa(self._noqa_line)
        super().check_physical(line)

    def _run(self, name: str) -> None:
        if name in self._logical:
            check, names = self._logical[name]
            self.init_checker_state(name, names)
            for offset, text in self.run_check(check, names) or ():
                self._found.append((offset, text, check))

    def check_logical(self) -> None:
        self._noqa_line = None
        if self._odd_token or self.verbose:
            super().check_logical()
            return
        tokens = self.tokens
        first_row = tokens[0][2][0]
        mapping = self._one_row_line(first_row)
        if mapping is None:
            mapping = self.build_tokens_line()
            if not mapping:
                return None
            rows = self.lines[first_row - 1 : tokens[-1][3][0]]
            several_rows = len(rows) > 1
            backslash = any("\\" in row for row in rows)
        else:
            several_rows = False
            backslash = "\\" in self.lines[first_row - 1]
        line = self.logical_line
        (start_row, start_col) = mapping[0][1]
        indent = self.lines[start_row - 1][:start_col]
        self.indent_level = pycodestyle.expand_indent(indent) if indent else 0
        if self.blank_before < self.blank_lines:
            self.blank_before = self.blank_lines
        self._found: list[tuple[Any, str, Any]] = []
        self._check_place(line, several_rows, backslash)
        if line:
            self._check_text(line, mapping[-1][1], several_rows, several_rows and backslash)
        if self.max_doc_length is not None:
            self._run("maximum_doc_length")
        for name in self._unknown_logical:
            self._run(name)
        self._report_found(mapping)
        if line:
            self.previous_indent_level = self.indent_level
            self.previous_logical = line
            if not self.indent_level:
                self.previous_unindented_logical_line = line
        self.blank_lines = 0
        self.tokens = []
        return None

    def _check_place(self, line: str, several_rows: bool, backslash: bool) -> None:
        """Run the checks of where a logical line is: blank lines, indentation, imports, comments, rows."""
        run = self._run
        # E301 to E306: blank lines or a decorator before the line, a definition, or a top-level statement less than two
        # blank lines after a definition
        if (
            self.blank_lines
            or self.previous_logical[:1] == "@"
            or line.startswith(("def", "class", "async", "@"))
            or (
                not self.indent_level
                and self.blank_before != 2
                and self.previous_unindented_logical_line.startswith(("def ", "class "))
            )
        ):
            run("blank_lines")
        # E111 to E117
        deeper = self.indent_level - self.previous_indent_level
        if self.indent_level % 4 or (not 0 < deeper <= 4 if self.previous_logical[-1:] == ":" else deeper > 0):
            run("indentation")
        # E402: an import, or the first statement after which imports are wrong
        if not self.indent_level and line:
            state = self._checker_states.get("module_imports_on_top_of_file", {})
            if line.startswith(("import ", "from ", "lazy ")) or not state.get("seen_non_imports", False):
                run("module_imports_on_top_of_file")
        if self._comments:  # E26x
            run("whitespace_before_comment")
        if several_rows:
            run("continued_indentation")  # E12x, E131: continuation lines
            if backslash:
                run("explicit_line_join")  # E502: a line that ends in a backslash
        if backslash:
            run("python_3000_invalid_escape_sequence")  # W605: a string with a backslash

    def _check_text(self, line: str, last: Any, several_rows: bool, joined: bool) -> None:
        """Run the checks of the text of a logical line, which is not empty.

        `last`: place of its last token. `joined`: tokens that touch in `line` may be rows apart.
        """
        run = self._run
        spaced = " ".join(line.split()) == line  # all white space is single spaces
        if not spaced:  # E22x, E27x: two white spaces or a tab
            run("whitespace_around_keywords")
            run("whitespace_around_operator")
        # E20x: white space next to a bracket or before , ; :
        if line[0] == "@" or (" " in line and pycodestyle.EXTRANEOUS_WHITESPACE_REGEX.search(line)) or not spaced:
            run("extraneous_whitespace")
        if self._tight_keyword:  # E275: a keyword and the next token with nothing between
            run("missing_whitespace_after_keyword")
        # E211: a space before a bracket that follows a name or a closing bracket
        if not spaced or joined or ((" (" in line or " [" in line) and _CALL_SPACE.search(line)):
            run("whitespace_before_parameters")
        # E225 to E231: on a plain line each operator and each , ; : has its spaces, or is where none are needed
        if (
            not spaced
            or self._comments
            or joined
            or "lambda" in line
            or self._tight_operator
            or (line[-1] in ",;:" and self._touches_more(last))
            or (_TIGHT.search(line) and not _tight_arguments_only(line))
        ):
            run("missing_whitespace")
        # E251, E252: "=" after an opening bracket with a space next to it; without one only in def, class and type
        if "=" in line and ("(" in line or "[" in line):
            opened = min(i for i in (line.find("("), line.find("[")) if i >= 0)
            if (
                not spaced
                or several_rows
                or line[-1] == "="
                or self._comments
                or line.find(" =", opened) >= 0
                or line.find("= ", opened) >= 0
                or line.startswith(("def", "async", "class", "type"))
            ):
                run("whitespace_around_named_parameter_equals")
        if line.startswith("import "):  # E401
            run("imports_on_separate_lines")
        # E70x, E731: a semicolon, or a colon before the end of a statement with a block or a lambda
        if ";" in line or (
            ":" in line[:-1] and ("lambda" in line or pycodestyle.STARTSWITH_INDENT_STATEMENT_REGEX.match(line))
        ):
            run("compound_statements")
        if "==" in line or "!=" in line:  # E711, E712, E721
            run("comparison_to_singleton")
            if "type" in line:
                run("comparison_type")
        if "not" in line:  # E713, E714
            run("comparison_negative")
        if line.startswith("except"):  # E722
            run("bare_except")
        if self._ambiguous:  # E741 to E743: the names l, O and I
            run("ambiguous_identifier")

    def _report_found(self, mapping: Any) -> None:
        """Report what the checks found, at its places in the file."""
        if not self._found:
            return
        if mapping[0][0] < 0:
            mapping = self.build_tokens_line()
        offsets = [offset for offset, _ in mapping]
        for offset, text, check in self._found:
            if not isinstance(offset, tuple):
                token_offset, position = mapping[bisect.bisect_left(offsets, offset)]
                offset = (position[0], position[1] + offset - token_offset)
            self.report_error(offset[0], offset[1], text, check)

    def _one_row_line(self, row: int) -> list[tuple[int, tuple[int, int]]] | None:
        """Build the logical line of a statement on a single row without a comment: the row with its strings muted.

        Returns the positions of its first and last token, with the offset -1: the mapping of offsets is built when
        something was found. Returns None for other statements; pycodestyle builds their logical lines."""
        tokens = self.tokens
        if self._comments or self._fancy_string or tokens[-1][3][0] != row:
            return None
        first = 0
        last = len(tokens) - 1
        while first <= last and tokens[first][0] in pycodestyle.SKIP_TOKENS:
            first += 1
        while last >= first and tokens[last][0] in pycodestyle.SKIP_TOKENS:
            last -= 1
        if first > last:
            return None
        start = tokens[first][2]
        end = tokens[last][3]
        if start[0] != row:
            return None
        line = self.lines[row - 1][start[1] : end[1]]
        for token in self._strings:
            at = token[2][1] - start[1]
            stop = token[3][1] - start[1]
            line = line[:at] + pycodestyle.mute_string(token[1]) + line[stop:]
        self.logical_line = line
        self.noqa = False
        return [(-1, start), (-1, end)]

    def check_all(self, expected: Any = None, line_offset: int = 0) -> Any:
        """pycodestyle's loop with its token generator inlined."""
        self.report.init_file(self.filename, self.lines, expected, line_offset)
        self.total_lines = len(self.lines)
        if self._ast_checks:
            self.check_ast()
        self.line_number = 0
        self.indent_char = None
        self.indent_level = self.previous_indent_level = 0
        self.previous_logical = self.previous_unindented_logical_line = ""
        self.tokens = []
        self.blank_lines = self.blank_before = 0
        self._new_logical_line()
        parens = 0
        prev_physical = ""
        newline = tokenize.NEWLINE
        nl = tokenize.NL
        op = tokenize.OP
        name = tokenize.NAME
        comment = tokenize.COMMENT
        error = tokenize.ERRORTOKEN
        string = tokenize.STRING
        try:
            for token in tokenize.generate_tokens(self.readline):
                token_type, text, start, end, line = token
                if start[0] > self.total_lines:
                    break
                self._noqa_line = line
                if token_type in _MAY_END_A_LINE or line[-2:] == "\\\n":
                    self.maybe_check_physical(token, prev_physical)
                prev_physical = line
                self.tokens.append(token)
                if token_type == op:
                    if text in "([{":
                        parens += 1
                    elif text in "}])":
                        parens -= 1
                elif not parens and token_type in (newline, nl):
                    if token_type == newline:
                        self._check_logical_line()
                        self.blank_before = 0
                    elif len(self.tokens) == 1:
                        self.blank_lines += 1
                        del self.tokens[0]
                    else:
                        self._check_logical_line()
                elif token_type == name:
                    if text in _NAMES_THAT_MATTER:
                        self._name(text, start[0], start[1], end[1])
                elif token_type == string:
                    self._strings.append(token)
                elif token_type == comment:
                    self._comments = True
                elif token_type == error:
                    self._odd_token = True
                elif token_type in _FANCY_STRINGS:
                    self._fancy_string = True
        except (SyntaxError, tokenize.TokenError):
            self.report_invalid_syntax()
        if self.tokens:
            self.check_physical(self.lines[-1])
            self._check_logical_line()
        return self.report.get_file_results()

    def _name(self, text: str, row: int, start: int, end: int) -> None:
        """Note a keyword that touches its neighbours, and ambiguous names."""
        if text in ("l", "O", "I"):
            self._ambiguous = True
            return
        line = self.lines[row - 1]
        after = line[end : end + 1]
        if after and (after not in " \n:" or line[end : end + 2] == ":="):
            self._tight_keyword = True
        if text in _WORD_OPERATORS and ((after and after not in " \n") or (start and line[start - 1] not in " \n")):
            self._tight_operator = True

    def _touches_more(self, end: tuple[int, int]) -> bool:
        """Whether a character that is no token follows directly: a backslash, a form feed, an unterminated string."""
        return self.lines[end[0] - 1][end[1] : end[1] + 1] not in ("", " ", "\n")

    def _check_logical_line(self) -> None:
        self.check_logical()
        self._new_logical_line()

    def _new_logical_line(self) -> None:
        self._odd_token = self._comments = self._fancy_string = False
        self._ambiguous = self._tight_keyword = self._tight_operator = False
        if self._strings:
            self._strings = []


class Report(pycodestyle.BaseReport):  # type: ignore[misc]
    """Keeps every error that is not ignored. Prints nothing."""

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.found: list[tuple[int, int, str]] = []

    def error(self, line_number: int, offset: int, text: str, check: Any) -> str | None:
        code = text[:4]
        if self._ignore_code(code):
            return None
        self.found.append((line_number, offset, code))
        return code


@functools.cache
def options() -> Any:
    # config_file=False and parse_argv=False: setup.cfg, tox.ini and the command line are not read
    return pycodestyle.StyleGuide(parse_argv=False, config_file=False, quiet=2, reporter=pycodestyle.BaseReport).options
