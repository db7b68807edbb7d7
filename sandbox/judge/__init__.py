"""The two-process judge: what runs inside a sandbox, and the session that drives it. Standard library only, and from
`sandbox` outside this folder only types.py; the judge image holds nothing else.

A container      supervisor.py (PID 1, the queue), nursery.py (forks slots, cleans up), protocol.py (frames to clients),
                 metrics.py (counters for Prometheus); own_uids.py, one_uid.py (with and without the right to switch)
A submission     session.py (test by test), clock.py (deadlines), script.py (stdin mode), zygote_client.py
A sandbox        zygote.py (forks a child per program, measures, kills, wipes); warming.py, cleaning.py, cpu.py,
                 seccomp.py, landlock.py, private_tmp.py
The program      solution.py, solution_peer.py (its end of the link)
The tests        evaluator.py, evaluator_peer.py (its end), proxies.py (what tests see of the program), grading.py (one
                 test string, and where a unittest runs), expectations.py (what a test's source says it needs)
Between them     link.py (calls both ways), frames.py (bytes), values.py and decoding.py (tagged JSON), value_types.py,
                 containers.py (changes in place), mirrors.py (Enums, named tuples, exceptions), lazies.py (iterators)
"""
