package conformance

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestLongChain mounts 128 layers, all that an image may have. The options of a
// mount have one page; containerd makes room by mounting from the directory
// that all lower directories share.
func TestLongChain(t *testing.T) {
	needRoot(t)
	t.Parallel()
	s := serve(t)
	parent := ""
	for i := 1; i <= 128; i++ {
		layer := fmt.Sprintf("layer %d", i)
		m, err := s.prepare(layer+" key", parent, nil)
		must(t, err)
		write(t, fmt.Sprintf("%s/from-%d", upper(t, m), i), "here")
		must(t, s.commit(layer, layer+" key", "", nil))
		parent = layer
	}
	m, err := s.prepare("top", parent, nil)
	must(t, err)
	mounted(t, m, func(dir string) {
		files, err := os.ReadDir(dir)
		must(t, err)
		if len(files) != 128 {
			t.Errorf("%d files of 128 are there", len(files))
		}
	})
	v, err := s.view("look", parent, nil)
	must(t, err)
	mounted(t, v, func(dir string) { wantFile(t, dir+"/from-1", "here") })

	var lower []string
	fixed := 0
	for _, o := range m[0].Options {
		if dirs, ok := strings.CutPrefix(o, "lowerdir="); ok {
			lower = strings.Split(dirs, ":")
		} else {
			fixed += len(o) + 1
		}
	}
	if len(lower) != 128 {
		t.Fatalf("%d lower directories, want 128", len(lower))
	}
	common := filepath.Dir(filepath.Dir(lower[0]))
	for _, dir := range lower {
		if filepath.Dir(filepath.Dir(dir)) != common {
			t.Fatalf("%s is not below %s: id-mapped mounts and containerd's shortening need one parent", dir, common)
		}
	}

	// A node that has lived long has long numbers; the default root is about as long as this one.
	serial := filepath.Base(filepath.Dir(lower[0]))
	rest := strings.TrimPrefix(lower[0], filepath.Join(common, serial))
	const digits = 12
	size := fixed + 2*digits + len("lowerdir=") + 128*(digits+len(rest)+1)
	if page := os.Getpagesize(); size > page {
		t.Errorf("128 layers with numbers of %d digits need %d bytes, a page has %d", digits, size, page)
	}
}
