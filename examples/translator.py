"""State in containers, several inputs at once, batches and streams: `mesh run examples/translator.py`.

Each language has containers of its own, which load its dictionary once. `Translator("fr").word` is a function like any
other: it can be spawned, mapped, and called by name from another program.
"""

import time
from collections.abc import Iterator

import mesh

app = mesh.App("translator")

DICTIONARIES = {"de": {"cat": "Katze", "dog": "Hund"}, "fr": {"cat": "chat", "dog": "chien"}}


@app.cls(max_containers=2, scaledown_window=30)
@mesh.concurrent(max_inputs=10)
class Translator:
    language: str = mesh.parameter(default="de")

    @mesh.enter()
    def load(self) -> None:
        time.sleep(0.2)  # a model takes its time, once a container
        self.words = DICTIONARIES[self.language]

    @mesh.method()
    def word(self, word: str) -> str:
        return self.words.get(word, f"({word}?)")

    @mesh.method()
    def stream(self, text: str) -> Iterator[str]:
        for word in text.split():
            yield self.words.get(word, word)

    @mesh.exit()
    def close(self) -> None:
        print("closing the dictionary of", self.language)


@app.function()
@mesh.batched(max_batch_size=20, wait_ms=50)
def lengths(words: list[str]) -> list[int]:
    """One run for up to twenty calls: what a GPU, or a database, likes best."""
    return [len(word) for word in words]


@app.local_entrypoint()
def main() -> None:
    german, french = Translator(), Translator("fr")
    print("one call:", german.word.remote("cat"))
    print("mapped:", list(french.word.map(["cat", "dog", "cow"])))
    print("streamed:", *german.stream.remote_gen("cat and dog"))
    print("batched:", list(lengths.map(["a", "bc", "def"])))
    print("patient:", german.word.spawn("dog").get(timeout=30))
