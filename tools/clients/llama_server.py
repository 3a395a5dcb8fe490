"""A pytest plugin that lets llama.cpp's tests ask another server with another model.

llama-server has some routes with and without /v1; they are asked for with it. Names of headers are compared without
regard to case. What llama.cpp's test model says is not expected of another one, while texts that a schema sets are.
"""

from requests.structures import CaseInsensitiveDict

ROUTES = ("/chat/completions", "/models")
MODEL_TEXTS = ("(Suddenly)+", "(going|bed)+")


def pytest_configure():
    import utils  # of llama.cpp's tests, whose conftest.py has been read by now

    make_url, match_regex = utils.ServerProcess.make_url, utils.match_regex

    def with_version(self, path, *arguments):
        return make_url(self, f"/v1{path}" if path.startswith(ROUTES) else path, *arguments)

    def match_text(regex, text):
        return bool(text) if regex in MODEL_TEXTS else match_regex(regex, text)

    def set_headers(self, headers):
        self.headers_of_reply = CaseInsensitiveDict(headers)

    utils.ServerProcess.make_url = with_version
    utils.ServerResponse.headers = property(lambda self: self.headers_of_reply, set_headers)
    utils.match_regex = match_text
