"""A report, read back: its tables, its tokens, and whatever a page could load."""

from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "input", "hr", "base", "wbr", "source"}


class Page(HTMLParser):
    """Tables by caption, each as rows of (text, number or None); tokens as [text, attributes]."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.ids, self.texts, self.scripts = [], [], [], []
        self.tables, self.tokens, self.references, self.open, self.figures = {}, [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        assert len(values) == len(attrs), f"an attribute twice in <{tag} {attrs}>"
        self.tags.append((tag, values))
        self.ids += [values["id"]] if "id" in values else []
        for name in ("aria-labelledby", "aria-describedby"):
            self.references += values.get(name, "").split()
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.caption, self.rows = "", []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append(["", None])
        elif tag == "data":
            if "table" in self.open:
                self.rows[-1][-1][1] = float(values["value"])
            else:
                self.figures.append(float(values["value"]))
        elif tag == "span" and values.get("role") == "option":
            self.tokens.append(["", values])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another"
        if tag == "table":
            rows = [[(text.strip(), value) for text, value in row] for row in self.rows]
            self.tables.setdefault(self.caption.strip(), []).append(rows)

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        if inside in ("script", "style"):
            self.scripts.append(data)
            return
        self.texts.append(data)
        if "caption" in self.open:
            self.caption += data
        elif "td" in self.open or "th" in self.open:
            self.rows[-1][-1][0] += data
        elif inside == "span" and self.tags[-1][1].get("role") == "option":
            self.tokens[-1][0] += data

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def column(self, caption, heading, *, table=0):
        """The cells of a column, as {row heading: (text, number)}."""
        head, *rows = self.tables[caption][table]
        place = [text for text, _ in head].index(heading)
        return {row[0][0]: row[place] for row in rows}

    def numbers(self, caption, heading, *, table=0):
        return {
            name: value for name, (_, value) in self.column(caption, heading, table=table).items()
        }
