"""Names in cards, against a renderer of Markdown, the Hub's own check of metadata, and Python."""

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from _mergekit_moe_ext_common.cards import (
    extend_card,
    fenced,
    in_markdown,
    is_on_hub,
    last_part,
    renew_section,
    section_before_title,
    without_folders,
    without_local_models,
)

NAMES = (
    "plain-name_v2.1",
    "a`b``c",
    "back\\slash",
    "a|b",
    "*bold* _thin_ ~~gone~~",
    "[here](https://example.com)",
    "![image](https://example.com/x.png)",
    "<script>alert(1)</script>",
    "<!-- a comment -->",
    "a &amp; b $x$",
    "# heading",
    "- item",
    "+ item",
    "=====",
    "---",
    "> quoted",
    "quote \" and ' quote",
)


def rendered(markdown):
    """The text that a reader sees, and the kinds of markup that it is dressed in."""
    tokens = MarkdownIt("commonmark").enable("table").enable("strikethrough").parse(markdown)
    inline = [token for token in tokens if token.type == "inline"]
    children = [child for token in inline for child in token.children]
    kinds = {child.type for child in children} | {token.type for token in tokens}
    text = "".join(child.content for child in children)
    return text, kinds - {"text", "text_special", "inline", "paragraph_open", "paragraph_close"}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_reads_as_it_is(name):
    assert rendered(in_markdown(name)) == (name, set())
    text, kinds = rendered(f"# {in_markdown(name)}")
    assert text == name and kinds == {"heading_open", "heading_close"}


def test_a_name_stays_on_its_line():
    name = "one\n\n# two\r\nthree\x1b[31m\u202efour"
    text, kinds = rendered(in_markdown(name))
    assert text == "one # two three [31m four" and not kinds


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stays_in_its_cell(name):
    table = f"| name | loss |\n|---|---:|\n| {in_markdown(name)} | 1.0 |"
    tokens = MarkdownIt("commonmark").enable("table").parse(table)
    cells = [token.content for token in tokens if token.type == "inline"]
    assert len(cells) == 4 and cells[3] == "1.0"
    assert rendered(cells[2]) == (name, set())


@pytest.mark.parametrize("text", ["a: 1", "```\n# out\n```", "a\n````\nb\n`````"])
def test_code_stays_in_its_block(text):
    tokens = MarkdownIt("commonmark").parse(fenced(text, "yaml") + "\n\nafter")
    assert tokens[0].type == "fence"
    assert tokens[0].content == text + "\n" and tokens[0].info == "yaml"
    assert tokens[2].content == "after"


def test_paths_lose_their_folders_and_ids_keep_theirs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "a+b=c").mkdir()
    expected = {
        "/home/me/models/base": "base",
        "/home/me/my models/base": "base",
        "./base": "base",
        "../base/": "base",
        "~/base": "base",
        "models/base": "base",
        "some/where/base": "base",
        ".": tmp_path.name,
        "owner/name": "owner/name",
        "gpt2": "gpt2",
        "https://example.com/a/b": "https://example.com/a/b",
        "and / or / both": "and / or / both",
    }
    assert {path: last_part(path) for path in expected} == expected
    document = {
        "models": [{"model": "models/base+/home/me/lora"}, {"model": str(tmp_path / "a+b=c")}],
        "calibration": "news=/home/me/news.jsonl:train[:1%]",
        "density": 0.5,
    }
    assert without_folders(document) == {
        "models": [{"model": "base+lora"}, {"model": "a+b=c"}],
        "calibration": "news=news.jsonl:train[:1%]",
        "density": 0.5,
    }


def test_what_is_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "here").mkdir(parents=True)
    assert is_on_hub("owner/name")
    for name in ("./base", "../base", "/a/b", "owner/here", "base", "a/b/c", "a/b\nc", "a--b/c`d"):
        assert not is_on_hub(name), name


def test_metadata_names_models_of_the_hub_alone():
    text = "---\nbase_model:\n- /home/me/base\n- owner/name\nlicense: mit\n---\n# Card\n\n---\nrule"
    card = without_local_models(text)
    assert ModelCard(card).data.to_dict() == {"base_model": ["owner/name"], "license": "mit"}
    assert card.endswith("\n# Card\n\n---\nrule")
    text = "---\nbase_model: ../base\ntags: [a]\n---\n# Card"
    assert without_local_models(text) == "---\ntags:\n- a\n---\n# Card"


@pytest.mark.parametrize(
    "text",
    [
        "# Card",
        "---\nbase_model: owner/name\n---\n# Card",
        "---\n: [\n---\n# Card",
        "---\n- a\n---\n",
    ],
)
def test_other_cards_stay_as_they_are(text):
    assert without_local_models(text) == text


def test_a_section_is_added_at_the_end(tmp_path):
    directory = tmp_path / "a`b"
    directory.mkdir()
    extend_card(directory, ["## Training", "", "Done."])
    assert (directory / "README.md").read_text() == "# a\\`b\n\n## Training\n\nDone.\n"
    (directory / "README.md").write_text("---\nbase_model: /x/y\n---\n# Card\n")
    extend_card(directory, ["## Training"])
    text = (directory / "README.md").read_text()
    assert "/x/y" not in text and text.endswith("# Card\n\n## Training\n")
    assert not yaml.safe_load(text.split("---\n")[1])


def test_a_section_is_renewed():
    card = "# Card\n\n## One\n\nold\n\n## Two\n\nkept\n"
    assert renew_section(card, "## One", ["new"]) == "# Card\n\n## Two\n\nkept\n\n## One\n\nnew\n"
    assert renew_section(card, "## One", []) == "# Card\n\n## Two\n\nkept\n"
    assert renew_section("# Card", "## One", []) == "# Card\n"


def test_a_section_stands_before_the_title():
    matter = "---\nlibrary_name: peft\n---\n"
    card = f"{matter}\n# Card\n\n## Two\n\nkept\n\n## One\n\nold\n"
    first = f"{matter}\n## One\n\nnew\n\n# Card\n\n## Two\n\nkept"
    assert section_before_title(card, "## One", ["new"]) == first
    assert section_before_title(first, "## One", ["new"]) == first
    both = first.replace("# Card", "## Three\n\nlast\n\n# Card")
    assert section_before_title(first, "## Three", ["last"]) == both
    assert section_before_title("text", "## One", ["new"]) == "text\n\n## One\n\nnew\n"


def test_a_section_of_an_adapter_is_added_before_the_template_of_peft(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nlibrary_name: peft\n---\n## Routed LoRA\n\nTwo.\n\n# Card\n\nempty\n")
    extend_card(tmp_path, ["## Training", "", "Done."])
    own, _, template = card.read_text().partition("# Card")
    assert own.endswith("## Routed LoRA\n\nTwo.\n\n## Training\n\nDone.\n\n")
    assert template == "\n\nempty\n"
