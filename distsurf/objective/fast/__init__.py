"""The fast path: steps that make a network faster to evaluate, each verified on this very job before it is used.

`steps` lists them, `verify` compares a network with the plain module, `choose` goes through the list.
"""
