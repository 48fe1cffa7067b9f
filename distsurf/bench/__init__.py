"""How fast a job is evaluated, beside other ways and beside what the machine can do; and how long it will take.

Every measurement runs in processes of its own, as the job will, so that none profits from another's settings.
"""
