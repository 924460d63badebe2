"""A queue of jobs: `mesh run examples/job_queue.py`, after `mesh deploy examples/job_queue.py`.

`submit` and `result` need nothing of this file but the names of the app and the function: any program can have them,
and the one that submits a job need not be the one that asks for its result.
"""

import time

import mesh

app = mesh.App("job-queue")


@app.function(retries=2, timeout=60)
def count_letters(text: str) -> dict[str, int]:
    """The work: a second of it, for a start."""
    time.sleep(1)
    return {letter: text.count(letter) for letter in sorted(set(text)) if letter.isalpha()}


def submit(text: str) -> str:
    """Put a job into the queue. Returns at once, with the id by which anybody can ask for the result."""
    work = mesh.Function.from_name("job-queue", "count_letters")
    return work.spawn(text).object_id


def result(job: str, patience: float = 0) -> str:
    """What has come of a job."""
    try:
        return f"done: {mesh.FunctionCall.from_id(job).get(timeout=patience)}"
    except mesh.exception.OutputExpiredError:
        return "gone: results are kept for seven days"
    except TimeoutError:  # Python's own; the one above is not one of these
        return "pending"


@app.local_entrypoint()
def main(text: str = "banana"):
    job = submit(text)
    print(job, result(job))
    print(job, result(job, patience=30))
