"""Where this runs: versions, settings, devices; what is known to go wrong there.

Nothing here imports a framework before it is asked for devices, and no failure of one is raised.
"""

from flaxstab._environment._describe import describe as describe
