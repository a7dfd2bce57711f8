"""The services by name, from the .proto files; no generated code."""

import pathlib
import subprocess
import tempfile

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from conftest import SOURCE


def load_messages():
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "set"
        subprocess.run(
            ["protoc", f"--proto_path={SOURCE}", f"--descriptor_set_out={path}", "--include_imports",
             "proto/vllm_inference.proto", "proto/health.proto"], check=True)
        files = descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes())
    return message_factory.GetMessages(files.file, descriptor_pool.DescriptorPool())


class GrpcClient:
    def __init__(self, address):
        self.messages = load_messages()
        self.channel = grpc.insecure_channel(address)

    def call(self, method, request, response, stream=False):
        make = self.channel.unary_stream if stream else self.channel.unary_unary
        return make(method, request_serializer=lambda message: message.SerializeToString(),
                    response_deserializer=self.messages[response].FromString)(request)

    def generate(self, stream=False, **fields):
        request = self.messages["vllm.GenerateRequest"](**fields)
        method = "/vllm.Inference/GenerateStream" if stream else "/vllm.Inference/Generate"
        return self.call(method, request, "vllm.GenerateResponse", stream)

    def health(self, service):
        request = self.messages["grpc.health.v1.HealthCheckRequest"](service=service)
        return self.call("/grpc.health.v1.Health/Check", request, "grpc.health.v1.HealthCheckResponse").status
