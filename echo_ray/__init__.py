"""echo_ray: endless, real-time generated video that survives the machine it runs on."""

__version__ = "0.1.0"
