"""A small app: `mesh deploy examples/word_count.py`, or `mesh run examples/word_count.py --text "…"`."""

import mesh

app = mesh.App("word-count")


@app.function()
def count_words(text):
    words = text.lower().split()
    print(f"counting {len(words)} words")
    return {word: words.count(word) for word in sorted(set(words))}


@app.function(retries=2)
def unlucky():
    if mesh.current_attempt() < 2:
        raise RuntimeError("no luck at the first try")
    return f"worked at try {mesh.current_attempt()}"


@app.local_entrypoint()
def main(text: str = "the mesh runs what the caller spawns"):
    print(count_words.remote(text))
