from keepsight.errors import reason


def test_reason():
    assert reason(ValueError("\n no such file.\nTraceback …")) == "no such file"
    assert reason(KeyError()) == "KeyError"
