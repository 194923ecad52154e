"""Pictures with labels and object masks, as people have them: folders, lists, data sets, public mask formats."""
