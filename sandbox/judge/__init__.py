"""What runs inside the sandboxes. Standard library only, and nothing from `sandbox` outside this folder.

zygote.py     PID 1 of each sandbox: forks a child per program, measures it, kills it, wipes after it
solution.py   the child that holds the program under judgement
evaluator.py  the child that holds the tests; proxies.py is what its tests see of the program
link.py       calls between those two; values.py is how their values cross; frames.py is the bytes on the wire
"""
