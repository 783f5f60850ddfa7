// nerdctl as the tests use it. `go install` refuses it: its go.mod replaces a nested test module that
// is not published. That module is only a stand-in here.
module speedy.invalid/tools/nerdctl

go 1.24.3

require github.com/containerd/nerdctl/v2 v2.2.2

replace github.com/containerd/nerdctl/mod/tigron => ./tigron
