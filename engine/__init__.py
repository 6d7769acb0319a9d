"""What every run needs and no equation mentions: files, corpora, settings, processes, checkpoints.

Modules of this folder import only each other; models, towers and tokenizers are passed in as
arguments. Whatever a reader needs to follow the paper belongs into a chapter at the top level,
whatever makes a chapter faster into fast/, and whatever is a command into tools/.
"""
