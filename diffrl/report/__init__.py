"""`diffrl report RUN...`: one self-contained HTML page about one or more runs, for a reader who has nothing but a browser.

html.py makes markup in which all text is escaped, runs.py reads runs (by the board's readers: what is half-written is read as
far as it goes) and says which of them are seeds of one configuration, charts.py draws, results.py and evaluations.py make the
tables, samples.py picks rollouts, page.py puts the sections together. The page has no script and loads nothing. Equal folders
give equal pages.
"""
