"""The queue of job_queue.py on the web: deploy that, and `mesh serve examples/job_queue_web.py`.

curl -X POST "$URL/submit?text=banana"      {"job":"fc-…"}
curl -i "$URL/result/fc-…"                  202 while it is pending, 200 with the result, 404 when there is none
"""

import mesh

image = mesh.Image.debian_slim().pip_install("fastapi")
app = mesh.App("job-queue-web", image=image)


@app.function()
@mesh.asgi_app()
@mesh.concurrent(max_inputs=20)
def web():
    from fastapi import FastAPI, HTTPException, Response

    site = FastAPI()

    @site.post("/submit")
    async def submit(text: str):
        work = mesh.Function.from_name("job-queue", "count_letters")
        job = await work.spawn.aio(text)
        return {"job": job.object_id}

    @site.get("/result/{job}")
    async def result(job: str):
        try:
            return await mesh.FunctionCall.from_id(job).get.aio(timeout=0)
        except TimeoutError:
            return Response(status_code=202)
        except (mesh.exception.OutputExpiredError, mesh.exception.NotFoundError):
            raise HTTPException(404, "no such job, or its result is no longer kept") from None

    return site
