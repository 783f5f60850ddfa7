// Command apply unpacks layers with containerd's own applier, for tests that compare what it makes of them.
//
// For each tar named as an argument it makes the directory of the same name without ".tar", as the upperdir of an
// overlay, on the parents named by -parents, and writes the error, if there is one, beside it (".error").
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
)

func main() {
	parents := flag.String("parents", "", "directories of the layers below, the topmost first, with colons")
	timing := flag.Bool("time", false, "say how long it took")
	flag.Parse()
	var opts []archive.ApplyOpt
	if *parents != "" {
		opts = append(opts, archive.WithParents(strings.Split(*parents, ":")))
	}
	for _, path := range flag.Args() {
		root := strings.TrimSuffix(path, ".tar")
		start := time.Now()
		if err := apply(path, root, opts); err != nil {
			if err := os.WriteFile(root+".error", []byte(err.Error()+"\n"), 0o644); err != nil {
				fatal(err)
			}
		}
		if *timing {
			fmt.Printf("%.3f\n", time.Since(start).Seconds())
		}
	}
}

func apply(path, root string, opts []archive.ApplyOpt) error {
	// As containerd's overlay snapshotter makes an upperdir.
	if err := os.Mkdir(root, 0o755); err != nil {
		fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		fatal(err)
	}
	defer f.Close()
	r, err := compression.DecompressStream(f)
	if err != nil {
		return err
	}
	defer r.Close()
	opts = append(opts, archive.WithConvertWhiteout(archive.OverlayConvertWhiteout))
	_, err = archive.Apply(context.Background(), root, r, opts...)
	return err
}

func fatal(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}
