"""Run by vLLM's Python: a client of its gRPC. Reads a job as JSON from its input, writes what came as its last line."""

from __future__ import annotations

import json
import sys

import grpc
from smg_grpc_proto.generated import vllm_engine_pb2, vllm_engine_pb2_grpc


def main() -> None:
    job = json.loads(sys.stdin.read())
    engine = vllm_engine_pb2_grpc.VllmEngineStub(grpc.insecure_channel(job["address"]))
    sampling = vllm_engine_pb2.SamplingParams(
        temperature=0.0, top_p=1.0, repetition_penalty=1.0, max_tokens=job["tokens"], ignore_eos=True
    )
    request = vllm_engine_pb2.GenerateRequest(
        request_id="test",
        tokenized=vllm_engine_pb2.TokenizedInput(input_ids=job["prompt"]),
        sampling_params=sampling,
        stream=job["stream"],
    )
    tokens: list[int] = []
    try:
        for answer in engine.Generate(request, timeout=60):
            tokens += answer.chunk.token_ids if job["stream"] else answer.complete.output_ids
    except grpc.RpcError as error:
        print("\n" + json.dumps({"code": error.code().name, "details": error.details()}))
        return
    print("\n" + json.dumps({"tokens": tokens}))


if __name__ == "__main__":
    main()
