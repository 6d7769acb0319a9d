"""What every run needs and no equation mentions: files, weights, images.

Nothing here imports a chapter; models, towers and modules are passed in as arguments.
"""
