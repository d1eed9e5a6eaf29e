"""TensorRT engines: profiles, the build in a process of its own, and what a plan says of itself."""
