"""The guide: what each of its techniques does to a deep net and to a recurrent one, measured."""
