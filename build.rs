//! Generates the gRPC stubs from `proto/`, without `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(
        [
            "services/snapshots/v1/snapshots.proto",
            "services/introspection/v1/introspection.proto",
            "services/version/v1/version.proto",
            "services/leases/v1/leases.proto",
            "services/diff/v1/diff.proto",
            "services/events/v1/events.proto",
            "events/content.proto",
            "services/content/v1/content.proto",
            "services/images/v1/images.proto",
            "services/namespaces/v1/namespace.proto",
            "services/containers/v1/containers.proto",
            "services/transfer/v1/transfer.proto",
            "services/streaming/v1/streaming.proto",
            "types/transfer/registry.proto",
            "types/transfer/imagestore.proto",
            "speedy/v1/layer.proto",
            "speedy/v1/control.proto",
        ],
        ["proto/containerd", "proto"],
    )?;
    tonic_prost_build::configure().include_file("proto.rs").compile_fds(descriptors)?;
    Ok(())
}
