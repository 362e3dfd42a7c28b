def model_card(report):
    return "---\n---\n"
