"""HTTP in front of generation's engine: OpenAI's completions and chat, infilling, a page to watch, metrics.

In: an open `Generator`, what the operator allows (`Options`).
Out: answers, whole or as they come.
Never imported here: megatron-core, models, checkpoints, training, the command line.

FastAPI, uvicorn, prometheus-client and google-re2 come with the extra `serve`: only the command imports this folder.
"""
