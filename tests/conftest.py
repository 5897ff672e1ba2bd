"""For every test: figures without a window, no way out to the network, the same random numbers."""

import contextlib
import http.server
import os
import threading

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
import torchvision
from refresh import patch_nbclient
from series import small_unet

patch_nbclient()  # some tests run notebooks with it
matplotlib.use("Agg")  # in this process only: the kernels that nbval starts choose for themselves
os.environ.setdefault("DDPM_DOWNLOAD", "0")  # for those kernels: 218 MiB of flowers are no test's


@pytest.fixture(autouse=True)
def offline_and_seeded(monkeypatch):
    nowhere = "http://127.0.0.1:9/"  # the discard port: refused at once
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [nowhere])
    monkeypatch.setenv("DDPM_URL", nowhere)
    monkeypatch.setenv("no_proxy", "*")  # a proxy would be between a test and its own server
    torch.manual_seed(0)
    yield
    plt.close("all")


@pytest.fixture
def one_thread():
    """For such small networks more threads cost more than they bring, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def serve(request):
    """serve(answer) starts a local server whose every GET is answered by answer(request).

    The server has `.url`, the paths that were `.asked` for, and `.ending`, an event that is set
    when the test is over.
    """
    def start(answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.server.asked.append(self.path)
                with contextlib.suppress(OSError):  # whoever asked may have gone
                    answer(self)

            do_HEAD = do_GET

            def log_message(self, *text):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads, server.asked, server.ending = True, [], threading.Event()
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        for end in (server.server_close, server.shutdown, server.ending.set):
            request.addfinalizer(end)  # the last of them is called first
        return server

    return start


def send(request, data, length=None):
    """Answers a request with these bytes."""
    request.send_response(200)
    request.send_header("Content-Length", str(len(data) if length is None else length))
    request.end_headers()
    request.wfile.write(data)


@pytest.fixture
def network():
    """A small network with labels whose answers differ from label to label."""
    model = small_unet(classes=3).eval()
    torch.manual_seed(4)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model
