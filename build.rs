//! Generates the gRPC stubs from `proto/`, without `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(
        [
            "services/snapshots/v1/snapshots.proto",
            "services/introspection/v1/introspection.proto",
            "services/version/v1/version.proto",
            "services/leases/v1/leases.proto",
        ],
        ["proto/containerd", "proto"],
    )?;
    tonic_prost_build::configure().include_file("proto.rs").compile_fds(descriptors)?;
    Ok(())
}
