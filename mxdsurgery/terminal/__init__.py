"""What a command says and draws.

`console` is the `Reporter` that all long work tells; `voice` is ``-q`` and ``-v``; `chart` draws.
"""
