"""How fast is this package, beside other implementations of the same model on the same machine?

``python -m tests.bench`` measures and writes ``build/bench``; ``--quick`` takes under a minute.

Read ``implementations`` first: what is compared, and through which calls. Then ``timing``: a race
is rounds in which every implementation runs once, so that a busy moment meets all of them, and a
ratio is the median over rounds. ``whole`` races models, ``layers`` the MoE and MLA layers alone,
``memory`` reads peaks in processes of their own, ``growth`` compares slopes with the operations
counted by ``accounting``, ``report`` and ``figure`` show it all. Nothing is timed before both
sides have been asserted to compute the same.
"""
