"""The chaos run: clients submit calls of all kinds while everything they need is killed, stopped and cut off.

`python3 dev chaos` runs it. A ledger of every call is checked at the end against what is stored and against what the
functions themselves counted: every accepted call ended exactly once, with the right value.
"""
