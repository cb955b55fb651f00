"""Entry points for engines, gateways and frameworks: one file each, which says at its top how it is switched on.

Nothing here is imported unless the other side asks for it.
"""
