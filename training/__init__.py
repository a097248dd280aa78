"""One Accelerate script per thing that is trained."""
