"""The rollout board: a small read-only web application over the folder of a run (`diffrl board RUN [RUN2]`).

index.py holds in memory what tables filter and sort by, reading.py reads one rollout from its file when it is asked for,
suspicion.py and orders.py look at every file once, series.py follows metrics.jsonl; run.py puts them together for one run,
api.py answers questions about runs as JSON, server.py is the web server and all that keeps it safe, static/ the pages.

Nothing here imports torch or transformers, so that the board starts at once and stays small.
"""
