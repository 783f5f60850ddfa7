// A link with a bandwidth, a delay and faults, in front of a registry or an object store. See main.go.
module speedy.invalid/tools/link

go 1.26.0
